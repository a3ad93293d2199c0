"""The backbone: whole passes on every architecture, layer ranges on those mapped."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, LINEAR, ids
from helpers.fresh_process import copies
from transformers import AutoModelForCausalLM

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import DynamicCache
from pondera.core.run_config import load as load_recipe
from pondera.models.backbone import Backbone
from pondera.training.build import new_model


@copies
def build(backbone: str) -> Backbone:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]))).eval().backbone


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backbone", BACKBONES)
class TestPlain:
    """An AdaptiveLM with nothing chosen is its backbone, bit for bit."""

    def pair(self, backbone: str, **config) -> tuple[AdaptiveLM, torch.nn.Module]:
        torch.manual_seed(0)
        ours = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]), **config)).eval()
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(ours.config.backbone).eval()
        return ours, theirs

    def test_logits_and_loss(self, backbone: str):
        ours, theirs = self.pair(backbone)
        x = ids(2, 9)
        a, b = ours(x, labels=x), theirs(x, labels=x)
        assert torch.equal(a.logits, b.logits)
        torch.testing.assert_close(a.loss, b.loss, atol=1e-6, rtol=1e-6)

    def test_generate(self, backbone: str):
        ours, theirs = self.pair(backbone)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        x, mask = ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
        assert torch.equal(ours.generate(x, **options), theirs.generate(x, **options))
        assert torch.equal(
            ours.generate(x, attention_mask=mask, **options), theirs.generate(x, attention_mask=mask, **options)
        )

    def test_gradients(self, backbone: str):
        ours, theirs = self.pair(backbone)
        x = ids(2, 9)
        with torch.enable_grad():
            ours.train()(x, labels=x).loss.backward()
            theirs.train()(x, labels=x).loss.backward()
        mine = dict(ours.backbone.lm.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(mine[name].grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)

    def test_saved_is_loaded_by_auto_classes(self, backbone: str, tmp_path):
        ours, _ = self.pair(backbone)
        ours.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again) is AdaptiveLM
        assert torch.equal(again(ids(1, 6)).logits, ours(ids(1, 6)).logits)

    def test_checkpoint_folder_is_wrapped(self, backbone: str, tmp_path):
        _, theirs = self.pair(backbone)
        theirs.save_pretrained(tmp_path)
        ours = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path))).eval()
        assert torch.equal(ours(ids(1, 6)).logits, theirs(ids(1, 6)).logits)
        assert "_checkpoint" not in ours.config.to_dict()


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - LINEAR))
class TestLayerRanges:
    def test_ranges_compose_to_a_whole_pass(self, backbone: str):
        model = build(backbone)
        h, count = model.embed(ids(2, 9)), model.config.num_hidden_layers
        whole = model.step(h)
        for cut in (0, 1, count):
            pieces = model.run(model.run(h, range(0, cut)), range(cut, count)) if cut else model.run(h, range(0, count))
            torch.testing.assert_close(pieces, whole, atol=0, rtol=0)

    def test_with_cache_and_padding(self, backbone: str):
        model = build(backbone)
        x, mask = ids(2, 9), torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        h, count = model.embed(x), model.config.num_hidden_layers
        whole = model.step(h, mask=mask, position_ids=positions)
        cache, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            part = model.run(h[:, start:stop], range(0, 2), cache, mask[:, :stop], positions[:, start:stop])
            pieces.append(model.run(part, range(2, count), cache, mask[:, :stop], positions[:, start:stop]))
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_unmapped_architecture_is_refused_by_name():
    with pytest.raises(UserError, match="qwen3_next: layer ranges are not supported.*llama"):
        build("qwen3_next").run(torch.zeros(1, 2, 64), range(0, 1))


@pytest.mark.parametrize("model_type", ["granite", "cohere"])
def test_scaled_logits_are_the_models_own(model_type: str):
    sizes = {name: size for name, size in BACKBONES["llama"].items() if name != "model_type"}
    scaling = {"logits_scaling": 8.0} if model_type == "granite" else {"logit_scale": 0.25}
    tree = {"model_type": model_type, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes, **scaling}
    model, x = AdaptiveLM(AdaptiveConfig(backbone=tree)).eval(), ids(1, 6)
    torch.testing.assert_close(model(x).logits, model.backbone.lm(x).logits, atol=1e-6, rtol=1e-5)


def test_logits_that_are_not_understood_are_refused(monkeypatch):
    monkeypatch.setattr(Backbone, "head", lambda self, h: 2 * self.lm.get_output_embeddings()(h))
    with pytest.raises(UserError, match="unsupported logit post-processing"):
        AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"])))


def test_kernels_that_misread_shared_positions_are_refused():
    backbone = {**BACKBONES["llama"], "attn_implementation": "flex_attention"}
    with pytest.raises(UserError, match="needs 'sdpa'"):
        AdaptiveLM(AdaptiveConfig(backbone=backbone, think="PonderLM2()"))


def test_a_config_file_cannot_name_another_checkpoint(tmp_path):
    AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]))).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"backbone": "somebody/else"}))
    with pytest.raises(UserError, match="names another checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_range_outside_the_stack_is_refused():
    with pytest.raises(UserError, match="not a range within the 3 layers"):
        build("llama").run(torch.zeros(1, 2, 64), range(1, 9))


@pytest.mark.parametrize("backbone", ["llama", "mistral", "gemma3", "gpt_neox", "gpt2", "qwen3"])
def test_a_pretrained_checkpoint_thinks_and_trains(backbone: str, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AdaptiveConfig(backbone=dict(BACKBONES[backbone])).backbone).save_pretrained(
        tmp_path
    )
    model = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path), think="PonderLM2(thoughts=1)")).train()
    x = ids(4, 12)
    h = model.backbone.embed(x)
    fed_back = model.think.feedback(model.backbone, model.backbone.step(h))
    assert fed_back.square().mean().sqrt() == pytest.approx(h.square().mean().sqrt().item(), rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        model.begin_step(step, 0)
        with torch.enable_grad():
            loss = model(x, labels=x).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


class TestBadInput:
    def test_unknown_architecture(self):
        with pytest.raises(UserError, match="did you mean 'llama'"):
            AdaptiveConfig(backbone={"model_type": "lama"})

    def test_unknown_backbone_field(self):
        with pytest.raises(UserError, match=r"did you mean 'backbone\.hidden_size'"):
            AdaptiveConfig(backbone={"model_type": "llama", "hiden_size": 64})

    def test_no_model_type(self):
        with pytest.raises(UserError, match="needs a model_type"):
            AdaptiveConfig(backbone={"hidden_size": 64})

    def test_no_such_checkpoint(self, tmp_path):
        with pytest.raises(UserError, match="neither a checkpoint folder"):
            AdaptiveConfig(backbone=str(tmp_path / "nothing"))

    def test_impossible_sizes(self):
        with pytest.raises(UserError, match="llama"):
            AdaptiveConfig(backbone={"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4})

    def test_scaled_init_would_overwrite_a_checkpoint(self, tmp_path):
        AdaptiveConfig(backbone=dict(BACKBONES["llama"])).backbone.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="would overwrite the weights"):
            AdaptiveConfig(backbone=str(tmp_path), init="scaled")

    def test_unknown_init(self):
        with pytest.raises(UserError, match="did you mean 'scaled'"):
            AdaptiveConfig(backbone=dict(BACKBONES["llama"]), init="scaledd")

    def test_unknown_method(self):
        with pytest.raises(UserError, match="did you mean 'PonderLM"):
            AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="PonderLM9()")


class TestFormerFields:
    """Fields of config files that were written before `rope_parameters` and `dtype` had these names."""

    SIZES = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "vocab_size": 97,
    }

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
            ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
            (
                {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
                {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            ),
        ],
    )
    def test_the_rotation_is_that_of_the_new_name(self, given: dict, expected: dict):
        """The same angles, and the mapping of the user stays as it was."""
        before = copy.deepcopy(given)
        former, new = (
            AdaptiveLM(AdaptiveConfig(backbone={"model_type": "llama", **self.SIZES, **fields}))
            for fields in (given, {"rope_parameters": expected})
        )
        angles = [model.backbone.decoder.rotary_emb.inv_freq for model in (former, new)]
        assert torch.equal(*angles) and given == before
        assert angles[0][1] == pytest.approx(5e5**-0.25 / expected.get("factor", 1.0))

    def test_other_names(self):
        neox = AdaptiveConfig(backbone={"model_type": "gpt_neox", "rotary_emb_base": 5000, "rotary_pct": 0.5}).backbone
        assert (neox.rope_parameters["rope_theta"], neox.rope_parameters["partial_rotary_factor"]) == (5000, 0.5)
        assert (
            AdaptiveConfig(backbone={"model_type": "llama", "torch_dtype": "bfloat16"}).backbone.dtype == torch.bfloat16
        )

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            (
                {"model_type": "gpt_neox", "rope_theta": 5e5},
                r"gpt_neox does not have it; write backbone.rope_parameters: \{rope_type: default, rope_theta: 500000.0\}",
            ),
            ({"model_type": "gpt2", "rope_theta": 5e5}, "unknown gpt2 setting 'backbone.rope_theta'"),
            (
                {"model_type": "llama", "partial_rotary_factor": 0.5},
                "unknown llama setting 'backbone.partial_rotary_factor'",
            ),
            ({"model_type": "llama", "rope_theta": 0}, "backbone.rope_theta: expected a number above 0, got 0"),
            (
                {
                    "model_type": "llama",
                    "rope_theta": 5e5,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                },
                "backbone.rope_theta: rope_parameters, its new place, is given as well",
            ),
            (
                {"model_type": "llama", "torch_dtype": "bfloat16", "dtype": "float32"},
                "its new name, is float32; give one",
            ),
        ],
    )
    def test_what_would_do_nothing_is_refused(self, given: dict, complaint: str):
        with pytest.raises(UserError, match=complaint):
            AdaptiveConfig(backbone=given)

    def test_in_a_recipe_and_on_the_command_line(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("base: plain\nbackbone: {rope_theta: 500000.0}\n")
        for config in (load_recipe(tmp_path / "mine.yaml"), load_recipe("plain", {"backbone.rope_theta": "500000.0"})):
            assert new_model(config, 97).backbone.config.rope_parameters["rope_theta"] == 5e5


PIPES: Any = {"capture_output": True, "text": True}
NAMES = "from pondera import AdaptiveLM"
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"
USE = "print(type(AutoModelForCausalLM.from_config(AutoConfig.for_model('pondera', backbone=SIZES))).__name__)"


@pytest.mark.parametrize(
    "imports", [f"{NAMES}; {AUTO}", f"{AUTO}; {NAMES}", f"{AUTO}; import pondera; pondera.AdaptiveConfig"]
)
def test_using_a_name_registers_whatever_the_order(imports: str):
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97}
    done = subprocess.run([sys.executable, "-c", f"{imports}; {USE.replace('SIZES', repr(sizes))}"], **PIPES)
    assert done.stdout.strip() == "AdaptiveLM", done.stderr


def test_importing_pondera_loads_nothing_and_leaves_no_hook():
    program = (
        "import sys; before = list(sys.meta_path); import pondera; "
        "print(before == sys.meta_path, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], **PIPES)
    assert done.stdout.strip() == "True set()", done.stderr


def test_no_entry_point_is_called_by_other_packages():
    """Only lm-eval's list of models and the command name us: nobody else's import may load Pondera."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"lm_eval.models": {"pondera": "pondera.evaluation.lm_eval_adapter:PonderaLM"}}

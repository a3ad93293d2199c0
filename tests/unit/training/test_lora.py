"""LoRA: the backbone stays what it was, the updates and the methods learn, and what is saved is an ordinary model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_worker
from helpers.training_worker import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from pondera.comparison.doctor import examine
from pondera.comparison.equal_cost import flops_per_step
from pondera.core.errors import Interrupted, UserError
from pondera.core.run_folder import Run
from pondera.cost.measure import measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass
from pondera.evaluation.cost_report import cost_report
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig
from pondera.training.build import new_model, resolve
from pondera.training.lora import LoraLinear, merge, merged, own_parameters, scale, trained_parameters
from pondera.training.train import train
from pondera.training.trainer import PonderaTrainer, arguments

IDS = torch.arange(1, 25).reshape(2, 12)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=280)
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "gqa-tied": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES},
}
PER_LAYER = {"gpt_neox": 4}
"""Linear layers of a decoder layer, where they are not the seven of a Llama."""
METHODS: dict[str, dict[str, str]] = {
    "none": {},
    "thoughts": {"think": "PonderLM2(thoughts=1)"},
    "router": {"think": "AdaptiveLatentCoT(steps=2)"},
    "pauses": {"think": "PauseToken(pauses=1)"},
    "concepts": {"chunk": "ConceptLM(chunk=4, codes=8, segments=4)"},
    "head": {"head": "VQLogits(codes=32)"},
    "memory": {"memory": "ElasticMemory(block=8)"},
}
RUN = {
    "train.steps": 6,
    "train.save_every": 2,
    "train.eval_every": 6,
    "train.keep": 100,
    "train.lr": 1e-2,
    "train.lora": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return training_worker.write_text(tmp_path_factory.mktemp("lora") / "text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of transformers with a tokenizer, by name."""
    from helpers import saved_models
    from transformers import AutoConfig

    made = {}
    for name, fields in BACKBONES.items():
        torch.manual_seed(0)
        kind, sizes = fields["model_type"], {key: value for key, value in fields.items() if key != "model_type"}
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **special))
        made[name] = tmp_path_factory.mktemp("backbones") / name
        for dtype in (torch.float32, torch.bfloat16) if name == "gqa-tied" else (torch.float32,):
            folder = made[name] if dtype == torch.float32 else made[name].with_name("bf16")
            lm.to(dtype).save_pretrained(folder)
            saved_models.tokenizer().save_pretrained(folder)
    return {**made, "bf16": made["gqa-tied"].with_name("bf16")}


def onto(text: Path, folder: Path, settings: dict[str, Any] | None = None):
    """The config of a run of six steps with LoRA from this checkpoint."""
    start = {"backbone": str(folder), "think": None, "init": "hf", "data.tokenizer": str(folder)}
    return resolve(tiny(text, {**start, **RUN, **(settings or {})}))


def built(text: Path, folder: Path, settings: dict[str, Any] | None = None) -> AdaptiveLM:
    return new_model(onto(text, folder, settings), 280)


def lora_layers(model: AdaptiveLM) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def perturbed(model: AdaptiveLM) -> AdaptiveLM:
    """With a ``B`` that is not zero."""
    draw = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_b_OR.data = 0.1 * torch.randn(layer.lora_b_OR.shape, generator=draw)
    return model.eval()


@pytest.fixture(scope="module")
def whole(text, folders, tmp_path_factory):
    """A run with thoughts, pause vectors trained beside LoRA, with a checkpoint of every second step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        config = onto(text, folders["gqa-tied"], METHODS["pauses"])
        return train(config, tmp_path_factory.mktemp("whole") / "run", progress=False)


# The layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 5)])
def test_layer_is_the_update_written_out(bias, shape):
    """Against the dense update, outputs and gradients."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4, bias=bias)
    layer = LoraLinear(linear, 2, 0.75, torch.Generator().manual_seed(0))
    layer.lora_b_OR.data.normal_()
    a_RI, b_OR = (each.detach().clone().requires_grad_() for each in (layer.lora_a_RI, layer.lora_b_OR))
    x = torch.randn(*shape, 6, requires_grad=True)
    slow = x @ (linear.weight.detach() + 0.75 * b_OR @ a_RI).T + (linear.bias.detach() if bias else 0)
    torch.testing.assert_close(layer(x), slow, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_a_RI, layer.lora_b_OR])
    theirs = torch.autograd.grad(slow.square().sum(), [x, a_RI, b_OR])
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    assert layer.weight.grad is None and layer.weight is linear.weight


@pytest.mark.parametrize("name", [*BACKBONES, "bf16"])
def test_starts_as_the_backbone(name, text, folders):
    model = built(text, folders[name]).eval()
    plain = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    assert len(lora_layers(model)) == 2 * PER_LAYER.get(name, 7)
    assert all(each.dtype == torch.float32 for each in model.parameters())
    for ids, given in ((IDS, mask), (IDS[:1], None), (IDS[:1, :1], None)):
        assert torch.equal(model(ids, attention_mask=given).logits, plain(ids, attention_mask=given).logits)


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_without_lora(method, text, folders):
    """A method on a backbone with LoRA starts as it does on the backbone itself."""
    settings = METHODS[method]
    ours, theirs = (built(text, folders["llama"], {**settings, "train.lora": rank}).eval() for rank in (4, 0))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", BACKBONES)
def test_merged_equals_unmerged(name, text, folders):
    model = perturbed(built(text, folders[name]))
    before, settings = model(IDS).logits, onto(text, folders[name]).train
    off = (built(text, folders[name]).eval()(IDS).logits - before).abs().max()
    assert off > 0.1, "the updates change something"
    weights, factors = merged(model.state_dict(), settings)
    assert len(factors) == 2 * len(lora_layers(model))
    plain = AdaptiveLM(AdaptiveConfig(backbone=str(folders[name]))).eval()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(IDS).logits, before, atol=1e-5, rtol=1e-5)
    merge(model)
    assert not lora_layers(model) and torch.equal(model(IDS).logits, plain(IDS).logits)


def test_arms_of_a_comparison_start_alike(text, folders):
    arms = [built(text, folders["llama"], METHODS[method]) for method in ("none", "pauses")]
    for ours, theirs in zip(*(lora_layers(arm).values() for arm in arms), strict=True):
        assert torch.equal(ours.lora_a_RI, theirs.lora_a_RI)
    other = lora_layers(built(text, folders["llama"], {"train.seed": 1}))
    assert not any(torch.equal(other[n].lora_a_RI, each.lora_a_RI) for n, each in lora_layers(arms[0]).items())


# What trains


@pytest.mark.parametrize("method", METHODS)
def test_only_updates_and_methods_learn(method, text, folders, tmp_path):
    settings = {**METHODS[method], "train.steps": 2, "train.grad_clip": 1e9}
    config = onto(text, folders["llama"], settings)
    model = new_model(config, 280)
    added = {id(each) for each in model.added_parameters()}
    names = {name for name, each in model.named_parameters() if "lora_" in name or id(each) in added}
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    norms = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs) -> None:
            grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
            assert grads.keys() <= names
            norms.append(float(torch.stack([grad.norm() for grad in grads.values()]).norm()))

    trainer = PonderaTrainer(
        model, arguments(config.train, str(tmp_path), 1), config.train, training_worker.Gappy(), callbacks=[Look()]
    )
    trainer.train()
    grouped = {id(each) for group in trainer._inner_optimizer().param_groups for each in group["params"]}
    assert grouped == {id(each) for name, each in model.named_parameters() if name in names and each.requires_grad}
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert moved <= names and {name for name in names if "lora_" in name} <= moved
    assert not added or any("lora_" not in name for name in moved)
    assert norms[-1] == pytest.approx(trainer.latest.grad_norm, rel=1e-5), "clipping sees what trains, and no more"
    assert trained_parameters(model) == sum(
        each.numel() for n, each in model.named_parameters() if n in names and each.requires_grad
    )


def test_lr_scale_is_for_methods(text, folders, tmp_path):
    config = onto(text, folders["llama"], {**METHODS["pauses"], "train.lr_scale": 0.1})
    model = new_model(config, 280)
    trainer = PonderaTrainer(model, arguments(config.train, str(tmp_path), 1), config.train, training_worker.Gappy())
    rates = {id(each): group["lr"] for group in trainer.create_optimizer().param_groups for each in group["params"]}
    assert rates[id(model.think.pause_PD)] == pytest.approx(1e-3)
    assert {rates[id(layer.lora_a_RI)] for layer in lora_layers(model).values()} == {1e-2}


def test_gradient_checkpointing_gives_the_same_weights(text, folders, tmp_path):
    plain, again = (
        train(onto(text, folders["llama"], {"train.gradient_checkpointing": on}), tmp_path / str(on), progress=False)
        for on in (False, True)
    )
    ours, theirs = (load_file(run.model_dir / "model.safetensors") for run in (plain, again))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


# What is saved


def test_saved_model_is_an_ordinary_one(whole, text, folders):
    model = load(whole.path, "cpu").model
    assert not lora_layers(model) and not any("lora" in name for name in model.state_dict())
    assert not (whole.model_dir / "lora.safetensors").exists()
    old = load_file(folders["gqa-tied"] / "model.safetensors")
    new = load_file(whole.model_dir / "model.safetensors")
    changed = {
        name.removeprefix("backbone.lm.")
        for name in new
        if not torch.equal(new[name], old.get(name.removeprefix("backbone.lm."), torch.tensor(0)))
    }
    matrices = {name for name in old if "proj" in name}
    assert changed == matrices | {"think.pause_PD"}
    result = whole.result()
    assert result["parameters"] == sum(each.numel() for each in model.parameters())
    rows_plus_columns = sum(sum(old[name].shape) for name in matrices)
    assert result["trained_parameters"] == 4 * rows_plus_columns + 32


def test_backbone_loads_with_plain_transformers(text, folders, tmp_path):
    """Without a method the saved backbone is a checkpoint of its architecture, and equals the trained model."""
    run = train(onto(text, folders["gqa-tied"]), tmp_path / "run", progress=False)
    loaded = load(run.path, "cpu", kernels="torch").model
    loaded.backbone.lm.save_pretrained(tmp_path / "plain")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(tmp_path / 'plain')!r}); torch.save(m(torch.arange(1, 25).reshape(2, 12)).logits, "
        f"{str(tmp_path / 'logits.pt')!r}); assert not any(n.startswith('pondera') for n in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), loaded(IDS).logits, atol=1e-6, rtol=1e-6)


def test_checkpoint_has_the_merged_weights_and_the_factors(whole, text, folders):
    folder = whole.checkpoints()[-1]
    factors, weights = load_file(folder / "lora.safetensors"), load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in factors.values())
    old = load_file(folders["gqa-tied"] / "model.safetensors")
    s = scale(whole.config.train)
    assert s == 4.0
    for name in factors:
        if name.endswith("a_RI"):
            layer = name.removesuffix("lora_a_RI")
            dense = (
                old[layer.removeprefix("backbone.lm.") + "weight"] + s * factors[f"{layer}lora_b_OR"] @ factors[name]
            )
            torch.testing.assert_close(weights[f"{layer}weight"], dense, atol=1e-6, rtol=1e-6)
    assert load_file(whole.model_dir / "model.safetensors").keys() == weights.keys()


def test_validation_is_that_of_the_saved_model(whole):
    from pondera.data.corpus import prepare
    from pondera.evaluation.score import score

    model = load(whole.path, "cpu").model
    loss = score(model, prepare(whole.config.data).validation, 32, 512, batch_size=4)["loss"]
    assert loss == pytest.approx(whole.result()["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [("gqa-tied", "none"), ("gqa-tied", "router"), ("bf16", "pauses"), ("bf16", "concepts"), ("gpt_neox", "head")],
)
def test_resumed_is_byte_identical(backbone, method, text, folders, tmp_path):
    config = onto(text, folders[backbone], METHODS[method])
    straight = train(config, tmp_path / "straight", progress=False)
    assert (straight.checkpoints()[0] / "lora.safetensors").is_file()
    for kept in (1, 2):  # from step 2, where the schedule is at its middle, and from step 4
        run = Run(shutil.copytree(straight.path, tmp_path / f"resumed-{kept}"))
        shutil.rmtree(run.model_dir)
        run.result_file.unlink()
        for folder in run.checkpoints()[kept:]:
            shutil.rmtree(folder)
        train(config, run.path, resume=True, progress=False)
        for ours, theirs in zip(run.checkpoints(), straight.checkpoints(), strict=True):
            for name in ("model.safetensors", "lora.safetensors"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes()
        assert (run.model_dir / "model.safetensors").read_bytes() == (
            straight.model_dir / "model.safetensors"
        ).read_bytes()
        assert [each["loss"] for each in run.metrics()] == [each["loss"] for each in straight.metrics()]


def test_stopped_by_a_signal_and_resumed(text, folders, tmp_path, monkeypatch):
    """Interrupted after the third step, which no setting would have saved."""
    config = onto(text, folders["llama"], METHODS["thoughts"])
    straight = train(config, tmp_path / "straight", progress=False)
    original = PonderaTrainer.get_batch_samples

    def stopping(self, *args):
        self.stop_asked = self.stop_asked or self.state.global_step == 2
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PonderaTrainer, "get_batch_samples", stopping)
        with pytest.raises(Interrupted, match="stopped after step 3"):
            train(config, tmp_path / "run", progress=False)
    run = train(config, tmp_path / "run", resume=True, progress=False)
    assert (run.model_dir / "model.safetensors").read_bytes() == (straight.model_dir / "model.safetensors").read_bytes()


def test_a_finished_run_is_a_backbone(whole, text, tmp_path):
    """Also for another round of LoRA, and the method's parameters are taken over."""
    model = new_model(onto(text, whole.model_dir, METHODS["pauses"]), 280).eval()
    assert torch.equal(model(IDS).logits, load(whole.path, "cpu", kernels="torch").model(IDS).logits)


# What it costs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BACKBONES)
def test_training_flops_are_those_that_torch_counts(name, attention, text, folders):
    """All but one product: the first attention needs no gradient of its inputs, the frozen embeddings."""
    model = built(text, folders[name])
    model.set_attn_implementation(attention)
    config = model.backbone.config
    rows, ids = 12, IDS[:1]
    spent = measured_flops(lambda: model(ids, labels=ids).loss.backward())
    first = [
        layer
        for path, layer in lora_layers(model).items()
        if ".0." in path and path.endswith(("q_proj", "k_proj", "v_proj", "query_key_value"))
    ]
    unneeded = sum(2 * rows * (layer.weight.numel() + layer.lora_a_RI.numel()) for layer in first)
    if name == "gpt_neox":  # attention and MLP are parallel, so the first MLP reads the frozen embeddings, too
        (wide,) = (layer for path, layer in lora_layers(model).items() if path.endswith("0.mlp.dense_h_to_4h"))
        unneeded += 2 * rows * (wide.weight.numel() + wide.lora_a_RI.numel())
    schedule = CostSchedule((DecoderPass(rows, rows),), head_rows=rows, tokens=rows)
    assert CostModel(config, lora=4).training(schedule) == spent + unneeded
    assert CostModel(config, lora=4).forward(schedule) == CostModel(config).forward(schedule), "it is merged"


@pytest.mark.parametrize(
    "settings",
    [
        {"think": "PonderLM2(thoughts=1, train_rounds=(2, 2))"},
        {"think": "AdaptiveLatentCoT(steps=2, halting='fixed')"},
        METHODS["pauses"],
        METHODS["concepts"],
        METHODS["memory"],
    ],
)
def test_methods_are_charged_for_what_they_compute(settings, text, folders):
    """Never for less than torch counts, and for little more: where inputs are frozen, see `CostModel.training`."""
    model, ids = built(text, folders["llama"], settings).train(), torch.arange(32)[None]
    for _ in range(2):  # the first batch initialises codebooks
        model.begin_step(0, 0, 1.0)
        spent = measured_flops(lambda: model(ids, labels=ids).loss.backward())
    assert 0.94 < spent / (32 * cost_report(model, 32, lora=4)["training_flops_per_token"]) <= 1


def test_frozen_weights_cost_two_thirds(text, folders):
    """In a wide model of short context, with the rank going to nothing."""
    config = AdaptiveConfig(
        backbone={"model_type": "llama", **SIZES, "hidden_size": 1024, "intermediate_size": 4096}
    ).get_text_config()
    schedule = CostSchedule((DecoderPass(8, 8),), head_rows=8, tokens=8)
    full, lora = (CostModel(config, lora=rank).training(schedule) for rank in (0, 1))
    assert lora / full == pytest.approx(2 / 3, rel=0.01)


def test_recomputation_runs_the_updates_again(folders):
    config = AdaptiveConfig(backbone=str(folders["llama"])).get_text_config()
    schedule = CostSchedule((DecoderPass(12, 12),), head_rows=12, tokens=12)
    prices = CostModel(config, lora=4)
    borders = 2 * (32 + 32) + 2 * (32 + 32) + 3 * (32 + 48)
    extra = prices.step(DecoderPass(12, 12)) + 2 * 12 * 4 * borders * 2
    assert prices.training(schedule, recompute=True) - prices.training(schedule) == extra


def test_layers_of_a_method_train_fully(folders):
    config = AdaptiveConfig(backbone=str(folders["llama"])).get_text_config()
    own = CostSchedule((DecoderPass(12, 12, layers=2),), head_rows=0, tokens=12)
    assert CostModel(config, lora=4).training(own) == CostModel(config).training(own)


def test_runs_and_comparisons_are_charged_for_lora(whole, text, folders):
    full, lora = (
        flops_per_step(onto(text, folders["gqa-tied"], {**METHODS["pauses"], "train.lora": rank})) for rank in (0, 4)
    )
    assert 2 / 3 < lora / full < 0.95
    assert whole.result()["train_flops"] == pytest.approx(6 * lora)


def test_doctor_says_what_trains(whole, text, folders):
    found = {each.topic: each for each in examine(onto(text, folders["llama"], METHODS["pauses"]))}
    assert found["lora"].text.startswith("rank 4; 4,000 parameters train")
    found = [each for each in examine(onto(text, folders["llama"], {"train.lora": 33}))]
    assert any(each.level == "problem" and "train.lora: rank 33" in each.text for each in found)


# What cannot be


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"train.lora": -1}, "train.lora: a rank of at least 0 .*got -1"),
        ({"train.lora_alpha": 0.0}, "train.lora_alpha: a number above 0, got 0.0"),
        ({"train.lora_alpha": float("inf")}, "train.lora_alpha: a number above 0, got inf"),
        (
            {"train.lora": 0, "train.lora_alpha": 8.0},
            "train.lora_alpha: 8 scales nothing without LoRA; add --train.lora 8",
        ),
        (
            {"train.freeze_backbone_steps": 2, **METHODS["pauses"]},
            "train.lora: 4 and train.freeze_backbone_steps: 2: .*leave",
        ),
        ({"train.lora": 17}, r"train.lora: rank 17 exceeds the 16 dimensions of .*k_proj; use --train.lora 16 or less"),
    ],
)
def test_settings_that_cannot_be(settings, complaint, text, folders, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(onto(text, folders["gqa-tied"], settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_new_weights_are_refused(text, tmp_path):
    with pytest.raises(
        UserError, match="LoRA freezes the backbone, and this one has new weights; .*--backbone smollm2"
    ):
        train(tiny(text, {"train.lora": 4}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_unknown_layers_are_refused(kind, text, tmp_path):
    from helpers import saved_models
    from transformers import AutoConfig

    sizes = {**SIZES, "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / kind)
    saved_models.tokenizer().save_pretrained(tmp_path / kind)
    with pytest.raises(
        UserError, match=f"the linear layers of {kind} are not known; supported: gemma3_text, gpt_neox, llama"
    ):
        built(text, tmp_path / kind)


def test_a_layer_of_another_class_is_refused(text, folders, monkeypatch):
    class Other(torch.nn.Linear):
        pass

    original = AdaptiveLM.float

    def swapped(self):
        self.backbone.decoder.layers[1].mlp.up_proj.__class__ = Other
        return original(self)

    monkeypatch.setattr(AdaptiveLM, "float", swapped)
    with pytest.raises(
        UserError, match=r"has a linear layer mlp.up_proj, and layer 1 of this backbone has a Other there"
    ):
        built(text, folders["llama"])


def test_a_changed_backbone_is_refused(text, folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "backbone")
    run = train(onto(text, folder), tmp_path / "run", progress=False)
    shutil.rmtree(run.model_dir)
    run.result_file.unlink()
    shutil.rmtree(run.checkpoints()[-1])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] + 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"layers.1.mlp.up_proj of .* has changed since the run was started; restore it"
    ):
        train(onto(text, folder), run.path, resume=True, progress=False)


def test_rank_cannot_change_in_a_run(whole, text, folders):
    with pytest.raises(UserError, match=r"train.lora \(4 before, 2 now\)"):
        train(onto(text, folders["gqa-tied"], {**METHODS["pauses"], "train.lora": 2}), whole.path, resume=True)


# By hand


def test_command(text, folders, tmp_path):
    """As the guide has it: a recipe of thoughts, a checkpoint and a rank; then the model generates."""
    words = ["ponderlm2", "--backbone", str(folders["gqa-tied"]), "--train.lora", "4", "--data.text", str(text)]
    words += ["--data.context", "32", "--train.steps", "2", "--train.eval_tokens", "128", "--out", "run"]
    command = [sys.executable, "-m", "pondera"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    done = subprocess.run([*command, "train", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = load(tmp_path / "run", "cpu").model
    counts = f"{4 * 2 * (2 * 64 + 2 * 48 + 3 * 80):,} of {own_parameters(model):,} parameters"
    assert f"trained:           {counts}: LoRA of rank 4, merged into the model" in done.stdout
    assert "LoRA of rank 4 in 14 matrices: 3,712 parameters train" in done.stderr
    again = [*command, "generate", "run", "--prompt", "abc", "--max-new-tokens", "3"]
    assert subprocess.run(again, cwd=tmp_path, env=env, capture_output=True).returncode == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "pondera"
    refused = subprocess.run(
        [*command, "train", "plain", "--train.lora", "4"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "train.lora: 4: LoRA freezes the backbone" in refused.stderr

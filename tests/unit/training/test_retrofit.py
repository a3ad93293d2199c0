"""A trained model goes on as a thinking one: nothing it knew is lost, and its weights wait where they are told to."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import saved_models, training_worker
from helpers.training_worker import tiny
from safetensors.torch import load_file, save_file

from pondera.core.errors import UserError
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.score import score
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig
from pondera.training.build import new_model, resolve
from pondera.training.train import train
from pondera.training.trainer import PonderaTrainer, arguments

IDS = torch.arange(1, 25).reshape(2, 12)
PAUSE = "PauseToken(pauses=1)"
WAITING, STEPS = 2, 4
MISTRAL = {
    "model_type": "mistral",
    "sliding_window": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    **training_worker.SIZES,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return training_worker.write_text(tmp_path_factory.mktemp("retrofit") / "text")


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A plain run, long enough to know more than a fresh model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        settings = {"think": None, "train.steps": 40, "train.lr": 1e-2, "train.eval_every": 40, "train.save_every": 40}
        return train(tiny(text, settings), tmp_path_factory.mktemp("trained") / "plain", progress=False)


@pytest.fixture(scope="module")
def staged(text, trained, tmp_path_factory):
    """A run from its weights whose backbone waits for two of four steps; with a checkpoint of each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train(in_stages(text, trained), tmp_path_factory.mktemp("staged") / "run", progress=False)


def onto(text: Path, backbone: Run | Path, think: str | None = PAUSE, settings: dict[str, Any] | None = None):
    """The tiny run, but from the weights of another one."""
    path = str(backbone.path if isinstance(backbone, Run) else backbone)
    return resolve(tiny(text, {"backbone": path, "think": think, **(settings or {})}))


def in_stages(text: Path, trained: Run):
    settings = {"train.steps": STEPS, "train.freeze_backbone_steps": WAITING, "train.save_every": 1, "train.keep": 100}
    return onto(text, trained, settings=settings)


def save(folder: Path, backbone: dict[str, Any], think: str | None = None, **arguments: Any) -> AdaptiveLM:
    """Writes an untrained model, and gives it back in eval mode."""
    torch.manual_seed(1)
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, think=think, **arguments)).eval()
    model.save_pretrained(folder)
    return model


def from_weights(folder: Path, think: str | None) -> AdaptiveLM:
    torch.manual_seed(2)
    return AdaptiveLM(AdaptiveConfig(backbone=str(folder), think=think)).eval()


def line(caplog: pytest.LogCaptureFixture) -> str:
    said = [record.getMessage() for record in caplog.records if "loaded: the backbone" in record.getMessage()]
    assert len(said) == 1
    return said[0]


# What is loaded from the old model


@pytest.mark.parametrize(
    "think",
    [
        None,
        "AdaptiveLatentCoT(steps=0, halting='fixed')",
        "PonderLM2(thoughts=0, feedback='vocab')",
        "PauseToken(pauses=0)",
    ],
)
def test_without_extra_passes_it_is_the_old_model(think, text, trained):
    config = onto(text, trained, think)
    assert config.backbone == config.data.tokenizer == str(trained.model_dir), "not a new tokenizer of the same size"
    old, new = load(trained.path, "cpu").model, new_model(config, 300).eval()
    assert new.config.embed_scale == old.config.embed_scale != 1 and new.config.init == "scaled"
    assert torch.equal(new(IDS).logits, old(IDS).logits)
    assert new.generation_config.eos_token_id == old.generation_config.eos_token_id == 0


@pytest.mark.parametrize("think", ["PonderLM2(thoughts=1)", "AdaptiveLatentCoT(steps=1, halting='fixed')"])
def test_loss_starts_near_that_of_the_old_model(think, text, trained):
    config = onto(text, trained, think)
    split = prepare(config.data).validation
    fresh = new_model(tiny(text, {"think": think}), 300)
    models = (load(trained.path, "cpu").model, new_model(config, 300), fresh)
    old, new, from_scratch = (score(model, split, 32, 512)["loss"] for model in models)
    assert from_scratch - old > 1 and new - old < 0.25 * (from_scratch - old)


def test_thoughts_are_matched_to_trained_embeddings(text, trained):
    """Weights drawn at unit RMS have left it; the scale that a method was trained with stays."""
    old = load(trained.path, "cpu").model.backbone
    new = new_model(onto(text, trained, "AdaptiveLatentCoT(steps=1, halting='fixed')"), 300).eval()
    ids = torch.randint(300, (64, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h_BTD = old.embed(ids)
        ratio = (h_BTD.square().mean() / old.step(h_BTD).square().mean()).sqrt()
    assert new.think.feedback.scale == pytest.approx(float(ratio), rel=0.05) and abs(ratio - 1) > 0.1


def test_method_is_taken_over_as_far_as_it_goes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pondera")
    backbone = {**training_worker.TINY["backbone"], "vocab_size": 97}
    old = save(tmp_path / "pause", backbone, PAUSE)
    new = from_weights(tmp_path / "pause", PAUSE)
    assert torch.equal(new.think.pause_PD, old.think.pause_PD) and torch.equal(new(IDS).logits, old(IDS).logits)
    assert line(caplog).endswith("method parameters: pause_PD; new: none; not used: none")

    caplog.clear()
    other = from_weights(tmp_path / "pause", "PauseToken(pauses=2)")
    assert other.think.pause_PD.shape[0] == 2 and not torch.equal(other.think.pause_PD[:1], old.think.pause_PD)
    assert line(caplog).endswith("method parameters: none; new: pause_PD; not used: pause_PD"), (
        "no part of another shape"
    )

    caplog.clear()
    save(tmp_path / "cot", backbone, "AdaptiveLatentCoT(steps=1, halting='fixed')", init="scaled")
    routed = from_weights(tmp_path / "cot", "AdaptiveLatentCoT(steps=2, halting='router')")
    assert routed.think.feedback.scale == 1, "what its thoughts were trained with"
    assert re.search(
        r"/cot: loaded: the backbone \(\d+ tensors\), method parameters: feedback.scale; "
        r"new: router.bias, router.weight; not used: none$",
        line(caplog),
    )


def test_windows_are_widened_once(tmp_path):
    """The saved config has the window of the tokens, whatever the slots of the method."""
    old = save(tmp_path / "old", MISTRAL, "PonderLM2(thoughts=1)")
    assert old.backbone.config.sliding_window == 8
    old.generation_config.eos_token_id = 7  # as `adopt` does, which the un-widened config never hears of
    old.save_pretrained(tmp_path / "old")
    assert json.loads((tmp_path / "old" / "config.json").read_text())["backbone"]["sliding_window"] == 4
    for think, window in ((None, 4), ("PonderLM2(thoughts=1)", 8), ("PauseToken(pauses=2)", 12)):
        new = from_weights(tmp_path / "old", think)
        assert (new.backbone.config.sliding_window, new.config.backbone.sliding_window) == (window, 4)
        assert new.generation_config.eos_token_id == 7
    assert torch.equal(from_weights(tmp_path / "old", "PonderLM2(thoughts=1)")(IDS).logits, old(IDS).logits)


def test_foreign_weights_twice_removed(tmp_path):
    """From another library's checkpoint in bfloat16 to a model in float32, and on from there: no bit is lost."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=97, **training_worker.SIZES)).bfloat16().save_pretrained(
        tmp_path / "theirs"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    first = from_weights(tmp_path / "theirs", None)
    assert torch.equal(first(IDS).logits, theirs(IDS).logits) and first.config.embed_scale == 1
    first.float()
    with torch.no_grad():
        first.get_input_embeddings().weight += 1e-6
    first.save_pretrained(tmp_path / "first")
    second = from_weights(tmp_path / "first", "AdaptiveLatentCoT(steps=0, halting='fixed')")
    assert second.dtype == torch.float32 and torch.equal(second(IDS).logits, first(IDS).logits)


# First the method, then all


def backbone_of(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in found.items() if name.startswith("backbone.")}


def test_backbone_waits_for_the_method(trained, staged):
    before, pauses = backbone_of(trained.model_dir), []
    for step, folder in enumerate(staged.checkpoints(), start=1):
        after = backbone_of(folder)
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert same == (list(before) if step <= WAITING else []), step
        pauses.append(load_file(folder / "model.safetensors")["think.pause_PD"])
    assert len(pauses) == STEPS and not any(torch.equal(a, b) for a, b in zip(pauses, pauses[1:], strict=False))


@pytest.mark.parametrize("step", [1, WAITING, WAITING + 1])
def test_resumed_in_either_stage(step, text, trained, staged, tmp_path):
    run = Run(shutil.copytree(staged.path, tmp_path / "run"))
    shutil.rmtree(run.model_dir)
    run.result_file.unlink()
    for folder in run.checkpoints()[step:]:
        shutil.rmtree(folder)
    train(in_stages(text, trained), run.path, resume=True, progress=False)
    for ours, theirs in zip(run.checkpoints(), staged.checkpoints(), strict=True):
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        states = [torch.load(folder / "optimizer.pt") for folder in (ours, theirs)]
        torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
        groups = [[(group["params"], group["lr"]) for group in state["param_groups"]] for state in states]
        assert groups[0] == groups[1]
    assert [each["loss"] for each in run.metrics()] == [each["loss"] for each in staged.metrics()]


@pytest.mark.parametrize("waiting", [0, 2])
def test_groups_of_the_optimizer(waiting, tmp_path, text):
    """Two of them, as ever, unless something waits; and each learns at the pace of its own."""
    config = tiny(text, {"think": PAUSE, "train.freeze_backbone_steps": waiting})
    model = new_model(config, 97)
    trainer = PonderaTrainer(model, arguments(config.train, str(tmp_path), 1), config.train, training_worker.Gappy())
    optimizer, scheduler = trainer.create_optimizer(), trainer.create_scheduler(config.train.steps)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    matrices = [name for name, p in model.named_parameters() if p.ndim >= 2]
    vectors = [name for name, p in model.named_parameters() if p.ndim < 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == ([0.1, 0.1, 0.0] if waiting else [0.1, 0.0])
    own = ["think.pause_PD"]
    expected = [own, [name for name in matrices if name not in own], vectors] if waiting else [matrices, vectors]
    assert groups == expected
    rates = []
    for _ in range(3):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert all(rate[0] > 0 and rate[0] == (rate[-1] or rate[0]) for rate in rates)
    assert [rate[-1] > 0 for rate in rates] == [step >= waiting for step in range(3)]


# A head of codes in place of the output matrix


def with_head(text: Path, trained: Run, init: str) -> AdaptiveLM:
    return new_model(onto(text, trained, None, {"head": f"VQLogits(codes=64, init='{init}')"}), 300).eval()


def test_codes_are_the_clusters_of_the_trained_rows(text, trained):
    """Each row of the codebook is the mean of the trained output rows with its code, and each row has the nearest code."""
    rows_VD = load(trained.path, "cpu").model.get_output_embeddings().weight.detach()
    head = with_head(text, trained, "kmeans").head
    table_KD, code_V = head.table_GKC.detach()[0], head.code_VG[:, 0]
    assert torch.equal(torch.cdist(rows_VD, table_KD).argmin(1), code_V)
    used = code_V.unique()
    means_KD = torch.stack([rows_VD[code_V == code].mean(0) for code in used])
    off, spread = (table_KD[used] - means_KD).norm(dim=1), (rows_VD - rows_VD.mean(0)).norm(dim=1).mean()
    assert len(used) > 50 and off.max() < 0.05 * spread


def test_clustered_head_starts_far_below_one_dealt_by_id(text, trained):
    split = prepare(onto(text, trained, None).data).validation
    old = score(load(trained.path, "cpu").model, split, 32, 512)["loss"]
    clustered, dealt = (score(with_head(text, trained, init), split, 32, 512)["loss"] for init in ("kmeans", "order"))
    assert dealt - old > 1 and clustered - old < 0.5 * (dealt - old)
    assert with_head(text, trained, "auto").head.code_VG.equal(with_head(text, trained, "kmeans").head.code_VG)


# What cannot be


@pytest.mark.parametrize(
    "think, steps, complaint",
    [
        (
            "PonderLM2(thoughts=1)",
            2,
            r"PonderLM2\(thoughts=1\) adds no parameters, so nothing would train in the first 2",
        ),
        ("PauseToken(pauses=0)", 2, r"PauseToken\(pauses=0\) adds no parameters.*use --train.freeze_backbone_steps 0"),
        (None, 2, "there is no method with parameters, so nothing would train"),
        (PAUSE, -1, "train.freeze_backbone_steps: at least 0, got -1"),
    ],
)
def test_stages_that_cannot_be(think, steps, complaint, text, trained, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(onto(text, trained, think, {"train.freeze_backbone_steps": steps}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_unfinished_run_is_no_backbone(text, trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    shutil.rmtree(run.model_dir)
    with pytest.raises(UserError, match=r"is not finished; .*--resume, or give .* e.g. .*/step-000040$"):
        onto(text, run)
    model = new_model(onto(text, run.checkpoints()[-1], None), 300).eval()
    assert torch.equal(model(IDS).logits, load(trained.path, "cpu").model(IDS).logits)
    shutil.rmtree(run.checkpoints_dir)
    with pytest.raises(UserError, match="is not finished; finish it with --resume$"):
        onto(text, run)


def test_weights_that_are_not_whole(text, trained, tmp_path):
    folder = shutil.copytree(trained.model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.lm.model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model is damaged \(model.safetensors has \d+ bytes instead of"):
        new_model(onto(text, folder), 300)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="weights are missing: backbone.lm.model.norm.weight; give a folder whose"):
        new_model(onto(text, folder), 300)
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        new_model(onto(text, folder), 300)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        new_model(onto(text, folder), 300)


def test_foreign_weights_that_are_not_whole(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXModel

    GPTNeoXModel(GPTNeoXConfig(vocab_size=97, **training_worker.SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights are missing: lm_head.weight; give a folder"):
        from_weights(tmp_path, None)


def test_other_tokens_do_not_fit(text, trained, tmp_path):
    """Neither more of them, nor as many but others."""
    saved_models.tokenizer().save_pretrained(tmp_path / "fewer")
    with pytest.raises(UserError, match=f"differ from those of .*--data.tokenizer {trained.model_dir}$"):
        new_model(onto(text, trained, settings={"data.tokenizer": str(tmp_path / "fewer")}), 280)
    shutil.copytree(trained.model_dir, tmp_path / "same")
    assert new_model(onto(text, trained, settings={"data.tokenizer": str(tmp_path / "same")}), 300).think is not None
    with pytest.raises(UserError, match=f"300 tokens .* has 301; .*--data.tokenizer {trained.model_dir}$"):
        new_model(onto(text, trained, settings={"data.tokenizer": str(tmp_path / "fewer")}), 301)
    assert new_model(onto(text, trained), 301).embedded == 300, (
        "its own may have more: `train` looks for them in the text"
    )
    with pytest.raises(UserError, match="4096 tokens exceed the 2048 positions of the backbone"):
        new_model(onto(text, trained, settings={"data.context": 4096}), 300)


# By hand


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["pausetoken"], "new: pause_PD"),
        (["plain", "--head", "VQLogits(64, init='kmeans')"], "loaded: the backbone"),
    ],
    ids=["think", "head"],
)
def test_command(words, seen, text, trained, tmp_path):
    """As the README has it: a recipe, and the run to go on from."""
    words = [*words, "--backbone", str(trained.path), "--data.text", str(text), "--data.context", "32"]
    words += ["--train.steps", "2", "--train.freeze_backbone_steps", "1", "--train.eval_tokens", "512", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "pondera", "train", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{trained.model_dir}: loaded: the backbone" in done.stderr and seen in done.stderr
    run = Run.open(tmp_path / "run")
    assert run.config.backbone == run.config.data.tokenizer == str(trained.model_dir)
    assert run.result()["passes_per_token"] == (2 if words[0] == "pausetoken" else 1)
    model = load(run.path, "cpu").model
    assert (model.head is not None) == (words[0] == "plain") and model(IDS).logits.shape[-1] == 300

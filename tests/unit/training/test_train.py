"""A run ends with the same weights however often it was killed, and says plainly what went wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_worker
from helpers.architectures import BACKBONES

from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.data.sampler import collate
from pondera.inference.load import load
from pondera.models import checkpoints
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.training.build import new_model
from pondera.training.train import check_settings, train
from pondera.training.trainer import PonderaTrainer

QWEN3_NEXT = {**BACKBONES["qwen3_next"], "vocab_size": 300}


def tiny(text: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """With dropout, so that random numbers matter."""
    return training_worker.tiny(text, {"backbone.attention_dropout": 0.1, **(settings or {})})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return training_worker.write_text(tmp_path_factory.mktemp("train") / "text")


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return train(tiny(text), tmp_path_factory.mktemp("straight") / "run", progress=False)


@pytest.fixture
def unfinished(straight, tmp_path):
    """A copy of it that has its checkpoints but no end."""
    shutil.copytree(straight.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    return Run.open(tmp_path / "run")


def same(run: Run, straight: Run) -> None:
    """The same weights, byte for byte, and the same losses, each once."""
    ours, theirs = ((place.model_dir / "model.safetensors").read_bytes() for place in (run, straight))
    assert ours == theirs
    lines, wanted = run.metrics(), straight.metrics()
    for key in ("step", "loss", "terms", "grad_norm", "lr", "tokens", "train_flops", "validation"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in wanted], key
    assert run.result()["loss"] == straight.result()["loss"]


def at_step(patch: pytest.MonkeyPatch, step: int, act) -> None:
    """Does something just before the step after `step`, once."""
    original, done = PonderaTrainer.get_batch_samples, []

    def first_act(self, *args):
        if self.state.global_step == step and not done:
            done.append(act(self))
        return original(self, *args)

    patch.setattr(PonderaTrainer, "get_batch_samples", first_act)


def test_what_a_run_leaves(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = straight.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation" in line] == [4, 8]
    assert lines[-1]["tokens"] == 8 * 4 * 32 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["terms"]["next_token"])
    assert lines[0]["lr"] == pytest.approx(2e-3) and 2e-4 <= lines[-1]["lr"] < 3e-4
    result = straight.result()
    assert result["bits_per_byte"] == lines[-1]["validation"]["bits_per_byte"]
    assert result["passes_per_token"] == 2 and result["train_flops"] == lines[-1]["train_flops"] > 0
    assert result["corpus"] == prepare(straight.config.data).digest
    assert checkpoints.find_damage(straight.model_dir) is None
    assert result["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4  # slots, keys and values, layers, width, bytes

    ids = torch.arange(1, 9)[None]
    logits = []
    for folder in (straight.model_dir, straight.checkpoints()[-1]):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert sum(p.numel() for p in model.parameters()) == result["parameters"]
        logits.append(model(ids).logits)
    assert torch.equal(*logits)
    assert not list(straight.path.glob("**/.*")) and not list(straight.path.glob("**/*.bin"))


def test_killed_and_resumed(straight, text, tmp_path):
    """kill -9 two steps after a checkpoint: those two are done again, alike."""
    run, config = Run(tmp_path / "run"), training_worker.write_config(tmp_path / "config.yaml", tiny(text))
    source = str(Path(__file__).parents[3] / "src")
    command = [sys.executable, training_worker.__file__, config, str(run.path), "--hang-before", "6"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": source}, stderr=subprocess.PIPE) as child:
        while child.poll() is None and len(run.metrics()) < 6:
            time.sleep(0.1)
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()
    assert [folder.name for folder in run.checkpoints()] == ["step-000004"]
    train(tiny(text), run.path, resume=True, progress=False)
    same(run, straight)


def test_methods_are_told_each_step(unfinished, text, monkeypatch):
    told = []
    monkeypatch.setattr(AdaptiveLM, "begin_step", lambda self, *step_and_seed: told.append(step_and_seed))
    shutil.rmtree(unfinished.checkpoints()[-1])
    train(tiny(text), unfinished.path, resume=True, progress=False)
    assert told == [(step, 0, step / 8) for step in range(4, 8)]


def test_asked_to_stop(straight, text, tmp_path, monkeypatch, capfd):
    config = tiny(text, {"train.save_every": 100})
    at_step(monkeypatch, 4, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"after step 5; continue with: pondera train .*run --resume"):
        train(config, tmp_path / "run", progress=False)
    assert "send the signal again to stop immediately" in capfd.readouterr().err
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["step-000005"]
    same(train(config, tmp_path / "run", resume=True, progress=False), straight)


def test_second_interrupt_stops_at_once(text, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda _: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(tiny(text), tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("what", ["error", "limit"])
def test_full_disk(what, straight, text, tmp_path, monkeypatch):
    """Once as an error of one library, once as the system's limit, which each library words in its own way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_):
        if what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        else:
            full = OSError(errno.ENOSPC, "No space left on device")
            monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(full))

    with monkeypatch.context() as patch:
        at_step(patch, 6, fill)
        try:
            with pytest.raises(Failure, match=r"of step 8 could not be written .*; the last .*step-000004 is intact"):
                train(tiny(text), tmp_path / "run", progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    monkeypatch.setenv("PONDERA_CACHE", str(straight.path.parents[2] / "cache"))
    run = Run.open(tmp_path / "run")
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-000004"]
    same(train(tiny(text), run.path, resume=True, progress=False), straight)


def test_full_disk_at_the_very_end(unfinished, straight, text, monkeypatch):
    """Not even room for the sample: the run is as good as saved, and says how to go on."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_trace", lambda *args: (_ for _ in ()).throw(full))
        with pytest.raises(Failure, match="cannot be written .*free disk space, then use --resume"):
            train(tiny(text), unfinished.path, resume=True, progress=False)
    same(train(tiny(text), unfinished.path, resume=True, progress=False), straight)


def test_windows_of_one_token_leave_no_sample(text, tmp_path):
    run = train(tiny(text, {"train.steps": 1, "data.context": 1}), tmp_path / "run", progress=False)
    assert run.result() is not None and run.traces() == {}


def damage_content(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def damage_size(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 1000)


@pytest.mark.parametrize(
    "damage, named",
    [
        (damage_content, "model.safetensors does not match its hash"),
        (damage_size, "optimizer.pt has 1000 bytes instead of"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
    ],
)
def test_damage_is_found(damage, named, straight, tmp_path):
    shutil.copytree(straight.checkpoints()[-1], tmp_path / "step-000008")
    assert checkpoints.find_damage(tmp_path / "step-000008") is None
    damage(tmp_path / "step-000008")
    assert named in checkpoints.find_damage(tmp_path / "step-000008")


def test_damaged_checkpoint_is_passed_over(straight, unfinished, text, caplog):
    damage_content(unfinished.checkpoints()[-1])
    same(train(tiny(text), unfinished.path, resume=True, progress=False), straight)
    assert re.search(
        r"step-000008 is damaged \(model.safetensors does not match its hash.*renamed to damaged", caplog.text
    )
    assert (unfinished.checkpoints_dir / "damaged-step-000008").is_dir()


def test_no_intact_checkpoint(unfinished, text):
    for folder in unfinished.checkpoints():
        damage_size(folder)
    with pytest.raises(Failure, match=r"no checkpoint is intact: .*step-000008.*step-000004.*another --out"):
        train(tiny(text), unfinished.path, resume=True, progress=False)


def test_no_checkpoint_yet(straight, unfinished, text):
    shutil.rmtree(unfinished.checkpoints_dir)
    same(train(tiny(text), unfinished.path, resume=True, progress=False), straight)


def test_killed_after_the_last_step(straight, unfinished, text):
    same(train(tiny(text), unfinished.path, resume=True, progress=False), straight)


def test_finished_run_is_left_alone(straight, text):
    before = {path: path.stat().st_mtime_ns for path in straight.path.rglob("*")}
    assert train(tiny(text), straight.path, resume=True).result() == straight.result()
    assert {path: path.stat().st_mtime_ns for path in straight.path.rglob("*")} == before


def test_line_that_spans_a_checkpoint(text, tmp_path, monkeypatch):
    """What is averaged for the next line is saved, too."""
    config = tiny(text, {"train.log_every": 3, "train.save_every": 2, "train.keep": 1})
    whole = train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 5, lambda _: 1 / 0)
        train(config, tmp_path / "run", progress=False)
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["step-000004"]
    same(train(config, tmp_path / "run", resume=True, progress=False), whole)


def test_not_finite(text, tmp_path, monkeypatch):
    """The message names step, windows and documents; the last good checkpoint is all there is."""
    seen = []

    def poison(trainer):
        seen.append((trainer.order.windows_of(5), trainer.train_dataset))
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[:] = torch.nan

    at_step(monkeypatch, 5, poison)
    with pytest.raises(Failure) as caught:
        train(tiny(text), tmp_path / "run", progress=False)
    message = str(caught.value)
    windows, dataset = seen[0]
    assert "step 6: the loss is nan" in message and "--train.lr 0.0007" in message and "step-000004" in message
    for window in windows:
        assert f"{window} ({dataset.split.document_at(window * 32)}" in message
    run = Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-000004"] and len(run.metrics()) == 5
    assert checkpoints.find_damage(run.checkpoints()[0]) is None and run.result() is None


def test_weights_that_are_not_finite_are_not_saved(straight, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(straight.model_dir)
    weights = {name: torch.full_like(tensor, torch.inf) for name, tensor in model.state_dict().items()}
    run = Run(tmp_path)
    with pytest.raises(Failure, match="non-finite"):
        checkpoints.save(run, 1, model, weights, {}, {}, straight.model_dir, keep=1)
    assert not list(run.checkpoints_dir.iterdir())


def test_progress_is_lines_without_a_terminal(text, tmp_path, capsys):
    config = tiny(text, {"train.steps": 4, "train.log_every": 2, "train.eval_every": 2})
    train(config, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert all(
        re.search(r"loss \d\.\d+  bits per byte \d\.\d+  [\d,]+ tokens/s  \d+:\d\d left", line) for line in lines
    )


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"train.steps": 0}, "train.steps: at least 1, got 0"),
        ({"train.lr": -1}, "train.lr: a number above 0, got -1"),
        ({"train.lr": float("inf")}, "train.lr: a number above 0, got inf"),
        ({"train.lr": float("nan")}, "train.lr: a number above 0, got nan"),
        ({"train.weight_decay": -1}, "train.weight_decay: a number of at least 0, got -1"),
        ({"train.beta1": 1.5}, "train.beta1: from 0 to below 1, got 1.5"),
        ({"train.beta2": -0.1}, "train.beta2: from 0 to below 1, got -0.1"),
        ({"train.seed": -1}, r"train.seed: an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"train.seed": 2**32}, "train.seed: .*got 4294967296"),
        (
            {"backbone": QWEN3_NEXT, "data.document_mask": True},
            "data.document_mask: the linear-attention layers of qwen3_next",
        ),
        ({"train.dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"backbone": None}, "backbone: None; give a mapping"),
        ({"backbone.vocab_size": 999}, r"999 tokens .* 'bpe-300' has 300; leave backbone.vocab_size out"),
        ({"backbone.max_position_embeddings": 16}, "32 tokens exceed the 16 positions .*--data.context 16 or"),
        (
            {"think": "AdaptiveLatentCoT(steps=1, halting='fixed')", "train.gradient_checkpointing": True},
            r"AdaptiveLatentCoT\(.*cannot be recomputed; leave gradient_checkpointing out",
        ),
    ],
)
def test_settings_that_cannot_be(settings, complaint, text, tmp_path):
    with pytest.raises(UserError, match=complaint):
        train(tiny(text, settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_batch_that_cannot_be_shared(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="4 windows cannot be split over 3 processes; use a multiple of 3"):
        train(tiny(text), tmp_path / "run")


def test_folders_that_cannot_be(straight, text, tmp_path):
    with pytest.raises(UserError, match="already contains a run; continue it with --resume, or give another folder"):
        train(tiny(text), straight.path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give another folder with --out"):
        train(tiny(text), tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        train(tiny(text), tmp_path / "nowhere", resume=True)


def test_resume_is_of_the_same_run(unfinished, text, tmp_path):
    with pytest.raises(UserError, match=r"train.steps \(8 before, 9 now\), train.lr \(0.002 before, 0.1 now\)"):
        train(tiny(text, {"train.lr": 0.1, "train.steps": 9, "train.log_every": 3}), unfinished.path, resume=True)
    other = training_worker.write_text(tmp_path / "other")
    (other / "0.txt").write_text("something else " * 500)
    config = json.loads(json.dumps(tiny(other).to_dict()))
    unfinished.config_file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="the text or the tokenizer has changed since step-000008"):
        train(tiny(other), unfinished.path, resume=True)


def test_isolated_documents_are_trained_and_read_apart(text: Path, tmp_path: Path):
    """With data.document_mask a token is read as if its document stood alone; without it, it is not."""
    config = training_worker.tiny(text, {"train.steps": 2, "data.document_mask": True, "data.context": 64})
    run = train(config, tmp_path / "run", progress=False)
    assert set(run.traces()) == {"sample", "depths"}
    corpus, model = prepare(config.data), load(str(run.path), "cpu").model
    windows = corpus.train.windows(64, document_mask=True)
    window = next(
        window for window in map(windows.__getitem__, range(len(windows))) if window["document_ids"].max() > 1
    )
    batch = collate([window])
    start = int((window["document_ids"] == 1).sum())
    with torch.no_grad():
        apart = model(**batch).logits[0, start:]
        together = model(batch["input_ids"]).logits[0, start:]
        alone = model(batch["input_ids"][:, start:], document_ids=batch["document_ids"][:, start:] - 1).logits[0]
    torch.testing.assert_close(apart, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(apart, together, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone.hidden_size": -32}, "backbone.hidden_size=-32"),
        ({"backbone.num_hidden_layers": 0}, "backbone.num_hidden_layers=0"),
        ({"backbone.hidden_act": "foo"}, "cannot be built"),
        ({"train.steps": 10**12}, "at most"),
    ],
)
def test_an_impossible_model_is_refused(change, said, text, tmp_path):
    with pytest.raises(UserError, match=said):
        config = tiny(text, change)
        check_settings(config.train)
        new_model(config, 300)

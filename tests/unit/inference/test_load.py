from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import saved_models
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.inference import load as load_module
from pondera.inference.generate import generate
from pondera.inference.load import load
from pondera.models import checkpoints
from pondera.models.adaptive_lm import AdaptiveLM

IDS = torch.arange(1, 9)[None]


def message(path: object, **arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **arguments)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_models.save(tmp_path / "model", "ponderlm2")


def test_model_folder(folder: Path):
    original = AdaptiveLM.from_pretrained(folder).eval()
    loaded = load(folder)
    assert not loaded.model.training and loaded.run is None and loaded.name == "model"
    assert torch.equal(loaded.model(IDS).logits, original(IDS).logits)
    assert loaded.tokenizer.get_vocab() == saved_models.tokenizer().get_vocab()
    # Llama's own default is token 2, a letter of this tokenizer: generation must not stop there.
    assert loaded.model.generation_config.eos_token_id == saved_models.tokenizer().eos_token_id == 0


def test_foreign_checkpoint_is_itself(tmp_path: Path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=280, n_positions=64)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.generation_config = GenerationConfig(eos_token_id=[7, 9], repetition_penalty=1.5)
    theirs.save_pretrained(tmp_path)
    saved_models.tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded.model, AdaptiveLM) and loaded.model.think is None and not loaded.model.training
    assert torch.equal(loaded.model(IDS).logits, theirs(IDS).logits)
    assert loaded.model.generation_config.eos_token_id == [7, 9]
    assert loaded.model.generation_config.repetition_penalty == 1.5
    assert loaded.model.num_parameters() == theirs.num_parameters()
    loaded.model.save_pretrained(tmp_path / "ours")
    saved_models.tokenizer().save_pretrained(tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours").model(IDS).logits, theirs(IDS).logits)


def test_run_gives_its_model_else_its_newest_checkpoint(tmp_path: Path):
    run = Run.create(tmp_path / "runs" / "first", RunConfig(name="mine"))
    assert "no checkpoint yet" in message(run.path)
    for step, name in ((5, "plain"), (10, "cot"), (9, "plain")):
        with run.saving(step) as partial:
            saved_models.save(partial, name)
            checkpoints._seal(partial)
    found = load(run.path)
    assert found.model.config.think == "AdaptiveLatentCoT(steps=1, halting='fixed')"
    assert found.name == "mine" and found.run is not None and found.run.path == run.path
    saved_models.save(run.model_dir, "exact")
    assert "exact" in str(load(run.path).model.config.think)
    inside = load(str(run.checkpoints()[0]))
    assert inside.model.config.think is None and inside.run is not None and inside.run.config.name == "mine"
    assert "first" in message(tmp_path / "runs")


def flip(file: Path) -> None:
    """Changes one bit in the middle of a file: header and size stay as they were."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_one_flipped_bit_is_found(tmp_path: Path):
    run = Run.create(tmp_path / "run", RunConfig(name="mine"))
    original = AdaptiveLM.from_pretrained(saved_models.save(tmp_path / "model"))
    tokenizer = tmp_path / "tokenizer"
    saved_models.tokenizer().save_pretrained(tokenizer)
    checkpoints.export(run, original, original.state_dict(), tokenizer)
    load(run.path)
    flip(run.model_dir / "model.safetensors")
    for path in (run.path, run.model_dir):
        assert f"{run.model_dir} is damaged (model.safetensors does not match its hash" in message(path)
    (run.model_dir / "manifest.json").unlink()
    load(run.path)


def test_damaged_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = Run.create(tmp_path / "run", RunConfig(name="mine"))
    for step, name in ((5, "plain"), (10, "cot")):
        with run.saving(step) as partial:
            checkpoints._seal(saved_models.save(partial, name))
    earlier, later = run.checkpoints()
    flip(later / "model.safetensors")
    assert load(run.path).model.config.think is None
    assert f"{later} is damaged (model.safetensors does not match its hash" in caplog.text
    assert "step-000005 is used instead" in caplog.text
    assert f"{later} is damaged" in message(later)
    flip(earlier / "model.safetensors")
    assert "no intact checkpoint" in message(run.path)


def test_paths_that_are_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load_module, "hub", nullcontext)  # no waiting for a name server; the tests are offline anyhow
    assert "is a file" in message(folder / "config.json")
    assert f"did you mean {str(folder)!r}" in message(tmp_path / "modle")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty")
    assert "nobody/nothing" in message("nobody/nothing")


def test_damaged_weights_are_named(folder: Path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 200):
        weights.write_bytes(damaged)
        assert str(weights) in message(folder)
    weights.unlink()
    assert "no weights" in message(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickled" in message(folder)
    weights.write_bytes(whole)
    load(folder)


def test_never_half_loaded(folder: Path):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "mlp" in key)
    rest = {key: value for key, value in tensors.items() if key != name}
    for content, complaint in (
        (rest, f"missing {name}"),
        ({**tensors, "extra": torch.zeros(1)}, "unexpected extra"),
        ({**tensors, name: tensors[name][:1].clone()}, "cannot be loaded"),
    ):
        save_file(content, weights, {"format": "pt"})
        assert complaint in message(folder)


def test_missing_shard_is_named(folder: Path):
    AdaptiveLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(folder)
    shards[1].unlink()
    assert shards[1].name in message(folder)


def test_damaged_config(folder: Path):
    config = folder / "config.json"
    tree = json.loads(config.read_text())
    for content in ("{", json.dumps({**tree, "model_type": "no_such"}), json.dumps({**tree, "think": "PonderLM9()"})):
        config.write_text(content)
        message(folder)
    assert "PonderLM2" in message(folder)
    other = saved_models.save(folder / "other")
    for change in ({"backbone": str(other)}, {"_checkpoint": str(other)}):
        config.write_text(json.dumps({**tree, **change}))
        assert "names another checkpoint" in message(folder)


def test_no_bar_is_shown(folder: Path, capfd: pytest.CaptureFixture):
    from transformers.utils import logging

    logging.enable_progress_bar()
    try:
        load(folder)
        assert logging.is_progress_bar_enabled(), "others may want theirs"
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr().err == ""


def test_tokenizer_must_be_there_and_fit(folder: Path, tmp_path: Path):
    from pondera.data.tokenizer import train_tokenizer

    larger = train_tokenizer(["one two three four five six seven eight nine ten eleven twelve " * 9], 300)
    larger.save_pretrained(folder)
    assert len(larger) > 280
    with pytest.raises(UserError, match="has embeddings for 280 tokens"):  # as soon as a text has one of the others
        generate(folder, "one two three four five six seven eight nine ten eleven twelve")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in message(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer" in message(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_device_that_is_not_here(folder: Path):
    assert "device='cuda'" in message(folder, device="cuda")


def test_loading_writes_nothing(folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

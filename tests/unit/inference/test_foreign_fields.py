"""What Pondera writes it can read, whatever a checkpoint's config.json, generation_config.json and tokenizer hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import saved_models, training_worker
from tokenizers import AddedToken

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.evaluation.kv_sweep import save
from pondera.evaluation.perplexity import evaluate
from pondera.inference.generate import generate
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig
from pondera.training.train import train

FOREIGN = {"is_llama_config": True, "rope_interleaved": False, "unk_token_id": 3}
THINK = "AdaptiveLatentCoT(steps=1, halting='fixed')"
IDS = torch.arange(1, 9)[None]


def compressed(checkpoint: Path, out: Path) -> Path:
    return save(load(checkpoint, "cpu"), spec.build("StreamingLLM(64)", "kv_cache"), "StreamingLLM(64)", out)


def trained(checkpoint: Path, out: Path) -> Path:
    text = training_worker.write_text(out.with_name(f"{out.name}-text"))
    settings = {
        "backbone": str(checkpoint),
        "data.tokenizer": str(checkpoint),
        "init": "hf",
        "think": THINK,
        "train.steps": 1,
    }
    return train(training_worker.tiny(text, settings), out, progress=False).path


def built(checkpoint: Path, out: Path) -> Path:
    AdaptiveLM(AdaptiveConfig(backbone=str(checkpoint), think=THINK)).save_pretrained(out)
    saved_models.tokenizer().save_pretrained(out)
    return out


WRITERS = pytest.mark.parametrize("write", [compressed, trained, built], ids=lambda write: write.__name__)


@WRITERS
def test_foreign_fields_of_a_config_are_kept(write: Callable[[Path, Path], Path], tmp_path: Path):
    found = load(write(saved_models.checkpoint(tmp_path / "theirs", FOREIGN), tmp_path / "ours"), "cpu")
    inner = found.model.config.get_text_config().to_dict()
    assert {name: inner[name] for name in FOREIGN} == FOREIGN
    again = built(tmp_path / "theirs", tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["backbone"]["rope_interleaved"] is False


def test_a_misspelt_field_of_a_user_is_refused(tmp_path: Path):
    for backbone in ({"model_type": "llama", "hiden_size": 32}, {"model_type": "llama", **FOREIGN}):
        with pytest.raises(UserError, match="unknown llama setting"):
            AdaptiveConfig(backbone=backbone)
    config = AdaptiveConfig(backbone={"model_type": "llama", "hidden_size": 32})
    config.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["backbone"]["hidden_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="invalid settings of llama"):
        AdaptiveConfig.from_pretrained(tmp_path)


@WRITERS
@pytest.mark.parametrize("ends", [[0, 9], [9, 0, 7]])
def test_all_end_tokens_are_kept(write: Callable[[Path, Path], Path], ends: list[int], tmp_path: Path):
    settings = {"eos_token_id": ends, "do_sample": True, "top_k": 64}
    theirs = saved_models.checkpoint(tmp_path / "theirs", generation=settings)
    found = load(write(theirs, tmp_path / "ours"), "cpu").model.generation_config
    assert found.eos_token_id == load(theirs, "cpu").model.generation_config.eos_token_id == ends
    assert found.top_k == 64 and found.do_sample is True


def test_end_tokens_without_the_one_of_the_tokenizer(tmp_path: Path):
    """A chat model that ends turns with another token. Training ends each document with EOS, so that one is added."""
    theirs = saved_models.checkpoint(tmp_path / "theirs", generation={"eos_token_id": 9})
    assert load(compressed(theirs, tmp_path / "small"), "cpu").model.generation_config.eos_token_id == 9
    assert load(built(theirs, tmp_path / "built"), "cpu").model.generation_config.eos_token_id == 9
    assert load(trained(theirs, tmp_path / "run"), "cpu").model.generation_config.eos_token_id == [9, 0]


def test_the_text_ends_at_every_end_token(tmp_path: Path):
    theirs = saved_models.checkpoint(tmp_path / "theirs")
    prompt = len(saved_models.tokenizer().encode("The"))
    free = load(theirs, "cpu")
    free.model.generation_config.eos_token_id = None
    ids = generate(free, "The", 8, temperature=0).ids[prompt:]
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[2]]}))
    stopped = generate(load(compressed(theirs, tmp_path / "small"), "cpu"), "The", 8, temperature=0)
    assert stopped.ids[prompt:] == ids[: ids.index(ids[2]) + 1]


@WRITERS
@pytest.mark.parametrize("settings", [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1, "eos_token_id": 0}])
def test_older_generation_settings_can_be_written_again(
    write: Callable[[Path, Path], Path], settings: dict, tmp_path: Path
):
    """transformers reads sampling settings without do_sample, and refuses to write them once anything else has changed."""
    theirs = saved_models.checkpoint(tmp_path / "theirs", generation=settings)
    assert load(write(theirs, tmp_path / "ours"), "cpu").model.generation_config.eos_token_id == 0


# Tokens that the model does not embed


def more_tokens(folder: Path, **special: str) -> Path:
    """A checkpoint whose tokenizer has two tokens that it does not embed, ids 280 and 281."""
    saved_models.checkpoint(folder)
    tokenizer = load(folder, "cpu").tokenizer
    tokenizer.add_tokens([AddedToken("<image>", special=True), AddedToken("<video>", special=False)])
    tokenizer.add_special_tokens(special)
    assert len(tokenizer) == 282 + len(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_text_without_such_tokens_runs(tmp_path: Path):
    folder, plain = more_tokens(tmp_path / "more"), saved_models.checkpoint(tmp_path / "plain")
    assert generate(folder, "The fox", 4, 0).ids == generate(plain, "The fox", 4, 0).ids
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox. " * 20)
    data = {"text": str(file), "context": 32}
    assert evaluate(folder, data)["loss"] == evaluate(plain, data)["loss"]
    for write in (trained, compressed):
        assert generate(write(folder, tmp_path / write.__name__), "The fox", 1).tokens


def test_such_a_token_in_a_text_is_refused_by_name(tmp_path: Path):
    folder = more_tokens(tmp_path / "more")
    for token in ("<image>", "<video>"):
        with pytest.raises(
            UserError, match=rf"the token '{token}' \(id 28[01]\), but the model has embeddings for 280 tokens"
        ):
            generate(folder, f"The {token} fox", 4)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("The <video> of the quick brown fox. " * 20)
    with pytest.raises(UserError, match="'<video>'"):
        evaluate(folder, {"text": str(text), "context": 32})
    settings = {"backbone": str(folder), "data.tokenizer": str(folder), "init": "hf", "think": THINK, "train.steps": 1}
    with pytest.raises(UserError, match="'<video>'"):
        train(training_worker.tiny(text, settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_padding_token_that_is_not_embedded_is_not_used(tmp_path: Path):
    folder = more_tokens(tmp_path / "more", pad_token="<pad>")
    (folder / "generation_config.json").unlink()
    assert load(folder, "cpu").model.generation_config.pad_token_id is None

"""A model with a memory: scored as it reads, priced by what it keeps, run by every verb."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import saved_models

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.evaluation.chunked_forward import chunked_forward
from pondera.evaluation.cost_report import cost_report
from pondera.evaluation.perplexity import evaluate
from pondera.evaluation.windows import held_out
from pondera.inference.load import load
from pondera.methods.kv_cache.streaming_llm import StreamingLLM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "fox.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. It does so every morning. " * 20)
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights, with all of the past, with room for all of it, and with little."""
    place = tmp_path_factory.mktemp("models")
    saved_models.save(place / "plain")
    for name, memory in (("ample", "StreamingLLM(500)"), ("little", "StreamingLLM(6)")):
        loaded = load(place / "plain")
        loaded.model.config.kv_cache = memory
        loaded.model.save_pretrained(place / name)
        loaded.tokenizer.save_pretrained(place / name)
    return {name: place / name for name in ("plain", "ample", "little")}


def test_scores_are_of_what_is_remembered(folders: dict[str, Path], text: Path):
    found = {name: evaluate(path, {"text": str(text), "context": 48}) for name, path in folders.items()}
    assert found["ample"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-5)
    assert abs(found["little"]["loss"] - found["plain"]["loss"]) > 1e-3
    assert found["little"]["kv_bytes_per_token"] < 0.7 * found["ample"]["kv_bytes_per_token"]
    assert found["little"]["tokens"] == found["plain"]["tokens"] and found["little"]["passes_per_token"] == 1


def test_reading_in_pieces_is_reading(folders: dict[str, Path]):
    model = load(folders["plain"]).model
    ids_BT = torch.randint(280, (2, 21), generator=torch.Generator().manual_seed(0))
    pieces = list(chunked_forward(model, model.new_cache(), ids_BT, prompt=10, piece=4))
    assert [start for start, _ in pieces] == [0, 10, 14, 18]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([p for _, p in pieces], 1), model(ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_memory_in_a_config_is_saved_loaded_and_used(tmp_path: Path):
    torch.manual_seed(0)
    config = AdaptiveConfig(
        backbone={"model_type": "llama", "vocab_size": 97, **SIZES}, kv_cache="StreamingLLM( 6 , sinks = 2)"
    )
    model = AdaptiveLM(config).eval()
    assert isinstance(model.kv_cache, StreamingLLM) and model.config.kv_cache == "StreamingLLM(6, sinks=2)"
    ids_BT = torch.randint(97, (2, 14), generator=torch.Generator().manual_seed(0))
    said = model.generate(ids_BT, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert said.past_key_values.method is model.kv_cache and said.past_key_values.get_seq_length() == 18
    model.save_pretrained(tmp_path)
    again = AdaptiveLM.from_pretrained(tmp_path).eval()
    found = again.generate(ids_BT, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, said.sequences)
    assert (
        cost_report(again, 64)["kv_bytes_per_token"]
        < 0.5 * cost_report(AdaptiveLM(AdaptiveConfig(backbone=config.backbone)), 64)["kv_bytes_per_token"]
    )


def test_caches_of_other_kinds_are_refused_by_name():
    model = AdaptiveLM(
        AdaptiveConfig(backbone={"model_type": "llama", "vocab_size": 97, **SIZES}, kv_cache="PreallocatedCache()")
    ).eval()
    with pytest.raises(UserError, match="brings its own cache"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_texts_longer_than_the_positions_are_for_models_that_read_block_by_block(tmp_path: Path, text: Path):
    given = {"text": str(text), "context": 150}
    saved_models.save(tmp_path / "plain")
    loaded = load(tmp_path / "plain")
    with pytest.raises(UserError, match="150 exceeds the 96 positions"):
        held_out(loaded, given, 1)
    loaded.model.config.memory = "ElasticMemory(block=16, order=8, samples=4)"
    endless = AdaptiveLM(loaded.model.config).eval()
    endless.save_pretrained(tmp_path / "endless")
    loaded.tokenizer.save_pretrained(tmp_path / "endless")
    windows = held_out(load(tmp_path / "endless"), given, 1)
    assert windows.ids_NT.shape == (1, 151) and windows.asked_NT.shape[1] > 151
    found = evaluate(tmp_path / "endless", given)
    assert found["loss"] > 0 and found["tokens"] > 150

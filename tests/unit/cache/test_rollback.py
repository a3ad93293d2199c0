"""Rollback of caches whose layers differ: all layers or none, for every method whose cache has layers of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies

from pondera import UserError
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

METHODS: dict[str, dict[str, Any]] = {
    "PonderLM2": {"think": "PonderLM2(thoughts=1, eval_rounds='exact')"},
    "PauseToken": {"think": "PauseToken(pauses=1)"},
    "ConceptLM": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4)"},
    "ConceptLM-think": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4, think=PonderLM2(thoughts=1))"},
    "PonderLM2-H2O": {"think": "PonderLM2(thoughts=1, eval_rounds='exact')", "kv_cache": "H2O(200)"},
    "H2O": {"kv_cache": "H2O(200)"},
    "ConceptLM-H2O": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4)", "kv_cache": "H2O(200)"},
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@copies
def build(method: str, backbone: str) -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), **METHODS[method]))
    if model.chunk is not None:
        model(ids(2, 16), labels=ids(2, 16))  # initializes its codebooks
    for name, parameter in model.named_parameters():
        parameter.mul_(1.5)
        if "heads" in name:
            parameter.normal_(std=0.3)
    return model.eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backbone", ["qwen3_mixed", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_cannot_roll_back_refuses_before_any_layer_changes(method: str, backbone: str):
    model, x_BT = build(method, backbone), ids(1, 28)
    cache: Any = model.new_cache()
    model(x_BT[:, :24], past_key_values=cache)
    with pytest.raises(UserError, match="sliding window of .*activate_past_recording"):
        cache.crop(-3)
    cache.crop(0)
    assert cache.get_seq_length() == 24
    close(model(x_BT[:, 24:], past_key_values=cache).logits, model(x_BT).logits[:, 24:])


@pytest.mark.parametrize("method", ["PonderLM2", "PauseToken", "H2O"])
@pytest.mark.parametrize("record", [True, False])
def test_a_recurrent_state_is_not_rolled_back(method: str, record: bool):
    model, x_BT = build(method, "qwen3_next"), ids(1, 28)
    cache: Any = model.new_cache()
    model(x_BT[:, :20], past_key_values=cache)
    if record:
        cache.activate_past_recording()
    model(x_BT[:, 20:24], past_key_values=cache)
    with pytest.raises(UserError, match="linear-attention layer .*new cache"):
        cache.crop(-3)
    close(model(x_BT[:, 24:], past_key_values=cache).logits, model(x_BT).logits[:, 24:])


@pytest.mark.parametrize("method", METHODS)
def test_recorded_drafts_are_rolled_back_and_earlier_tokens_are_not(method: str):
    model, x_BT = build(method, "qwen3_mixed"), ids(1, 28)
    cache: Any = model.new_cache()
    model(x_BT[:, :20], past_key_values=cache)
    cache.activate_past_recording()
    model(ids(1, 4, seed=5), past_key_values=cache)
    with pytest.raises(UserError, match="crop: cannot roll back"):
        cache.crop(-6)
    cache.crop(-4)
    close(model(x_BT[:, 20:], past_key_values=cache).logits, model(x_BT).logits[:, 20:])


@pytest.mark.parametrize("backbone", ["llama", "qwen3_mixed", "qwen3_next"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_are_repeated_and_selected_after_all_tokens_were_rolled_back(method: str, backbone: str):
    if backbone == "qwen3_next" and ("ConceptLM" in method or method == "H2O"):
        pytest.skip("no layer map, or rows that transformers does not repeat")
    model, x_BT = build(method, backbone), ids(2, 15)
    cache: Any = model.new_cache()
    model(x_BT, past_key_values=cache)
    cache.crop(-15)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    found = model(x_BT[[0, 1, 1]], past_key_values=cache).logits
    close(found, model(x_BT, use_cache=True).logits[[0, 1, 1]])

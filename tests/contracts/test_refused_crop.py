"""A refused `crop` changes nothing, for every KV-cache method, alone and below a think or chunk method.

Layers may differ in what they can roll back: budgets per layer, tokens that later layers never see. Each number of tokens
is tried. Where it is refused, the cache has the same bytes as before and continues with the same logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.declared import forms
from torch import Tensor

from pondera import UserError
from pondera.cache.state import BatchState, state_of
from pondera.core import spec
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

SEEN = 24
FORMS = {name: declared["tight"] for name, declared in forms("kv_cache").items() if "tight" in declared}
BY_LAYER = {
    "budgets per layer": "H2O([200, 8, 6])",
    "codes in units": "KIVI(2, group=4, window=4, sinks=1)",
}
METHODS: dict[str, dict[str, Any]] = {
    "think": {"think": "AdaptiveLatentCoT(steps=1, halting='random')"},
    "interleaved": {"think": "PonderLM2(thoughts=1, eval_rounds='exact')"},
    "chunk": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4)"},
}
BELOW = {
    f"{name} in {seam}": {**chosen, "kv_cache": text}
    for seam, chosen in METHODS.items()
    for name, text in BY_LAYER.items()
}
CASES = {name: {"kv_cache": text} for name, text in (FORMS | BY_LAYER).items()} | BELOW


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(case: str) -> AdaptiveLM:
    torch.manual_seed(0)
    backbone = copy.deepcopy(BACKBONES["llama"])
    chosen: dict[str, Any] = dict(CASES[case])
    method = spec.build(chosen.pop("kv_cache"), "kv_cache")
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, **chosen))
    if model.chunk is not None:
        model(ids(2, 16), labels=ids(2, 16))  # initializes its codebooks
    for parameter in model.parameters():
        parameter.mul_(1.5)
    model.kv_cache = method if method.fitted else method.fit(model, [ids(4, 20)])
    return model.eval()


def filled(model: AdaptiveLM) -> Any:
    """A cache after a prompt and some single tokens, none of which may be rolled back for sure."""
    cache: Any = model.new_cache()
    x_BT = ids(2, SEEN)
    for piece in x_BT.split((16, 1, 1, 1, 1, 4), 1):
        model(piece, past_key_values=cache)
    return cache


def flat(value: Any) -> list[Any]:
    """All values of a state, tensors as bytes."""
    if isinstance(value, Tensor):
        return [
            tuple(value.shape),
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item(),
        ]
    if isinstance(value, BatchState):
        return [item for name, part in state_of(value).items() for item in (name, *flat(part))]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in flat(part)]
    if isinstance(value, dict):
        return [item for key, part in value.items() for item in (key, *flat(part))]
    if hasattr(value, "keys") and hasattr(value, "values") and not isinstance(value, type):  # a layer of transformers
        return flat([value.keys, value.values])
    return [value]


@pytest.mark.parametrize("case", CASES)
def test_a_refused_crop_changes_nothing(case: str):
    model = build(case)
    first, refused = filled(model), 0
    expected = model(ids(2, 4, seed=9), past_key_values=copy.deepcopy(first)).logits
    for removed in range(1, SEEN + 1):
        cache = copy.deepcopy(first)
        before = flat(cache)
        try:
            cache.crop(-removed)
        except UserError as error:
            refused += 1
            assert "crop: " in str(error)
            assert flat(cache) == before, f"half of crop({-removed})"
            assert cache.get_seq_length() == SEEN
            assert torch.equal(model(ids(2, 4, seed=9), past_key_values=cache).logits, expected)
        else:
            assert cache.get_seq_length() == SEEN - removed
    evicts = "H2O" in CASES[case]["kv_cache"] or case in BY_LAYER
    assert refused or not evicts, "this shows nothing"

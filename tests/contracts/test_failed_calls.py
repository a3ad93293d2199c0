"""The contract test of calls that end in an error, for every think, chunk and memory method, also with a KV-cache method.

A cache with half of a call is refused by name until it is reset. A call that is refused before it changes the cache leaves it
as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.declared import forms
from helpers.fresh_process import copies

from pondera import UserError
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

CASES: dict[str, dict[str, Any]] = {
    f"{seam}-{name}": {seam: declared["exact"]}
    for seam in ("think", "chunk", "memory")
    for name, declared in forms(seam).items()
    if "exact" in declared
} | {
    f"{method} with H2O": {seam: method, "kv_cache": "H2O(200)"}
    for seam, method in (
        ("think", "PonderLM2(thoughts=1)"),
        ("think", "UniversalTransformer(steps=2, halting='random')"),
        ("chunk", "ConceptLM(chunk=3, codes=8, segments=4)"),
    )
}
SEEN = 7
REFUSED = "half of a call"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@copies
def build(case: str) -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), **CASES[case]))
    if model.chunk is not None:
        model(ids(2, 16), labels=ids(2, 16))  # initializes its codebooks
    for name, parameter in model.named_parameters():
        parameter.mul_(1.5)
        if name.startswith("think.") or "heads" in name:
            parameter.normal_(std=0.3)
    return model.eval()


def filled(model: AdaptiveLM) -> Any:
    cache = model.new_cache()
    model(ids(2, SEEN), past_key_values=cache)
    return cache


class Stopped(Exception):
    """Raised by a layer of the backbone."""


def stopped_call(model: AdaptiveLM, cache: Any, layer: int, after: int) -> bool:
    """A call in which a layer raises at its nth run; whether it got that far."""
    runs = 0

    def stop(*_: Any) -> None:
        nonlocal runs
        runs += 1
        if runs > after:
            raise Stopped

    handle = model.backbone.decoder.layers[layer].register_forward_pre_hook(stop)  # type: ignore[index]
    try:
        model(ids(2, 3, seed=4), past_key_values=cache)
    except Stopped:
        return True
    finally:
        handle.remove()
    return False


@pytest.mark.parametrize(("layer", "after"), [(0, 0), (1, 0), (2, 0), (0, 1), (2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_a_cache_with_half_of_a_call_is_refused_until_it_is_reset(case: str, layer: int, after: int, tmp_path: Any):
    model: Any = build(case)
    x_BT, cache = ids(2, SEEN + 4, seed=2), filled(model)
    if not stopped_call(model, cache, layer, after):
        pytest.skip("this method runs fewer passes")
    for again in (
        lambda: model(ids(2, 1), past_key_values=cache),
        lambda: model.generate(x_BT, past_key_values=cache, max_new_tokens=2, pad_token_id=0),
        lambda: cache.save(tmp_path / "cache"),
    ):
        with pytest.raises(UserError, match=REFUSED):
            again()
    with pytest.raises(UserError, match=REFUSED):
        model(ids(2, 1), past_key_values=copy.deepcopy(cache))
    cache.reset()
    model(x_BT[:, :SEEN], past_key_values=cache)
    found = model(x_BT[:, SEEN:], past_key_values=cache).logits
    new = model.new_cache()
    model(x_BT[:, :SEEN], past_key_values=new)
    torch.testing.assert_close(found, model(x_BT[:, SEEN:], past_key_values=new).logits, atol=1e-5, rtol=1e-5)


WRONG: dict[str, Callable[[AdaptiveLM, Any], Any]] = {
    "short mask": lambda model, cache: model(
        ids(2, 3), attention_mask=torch.ones(2, 1, dtype=torch.long), past_key_values=cache
    ),
    "other batch": lambda model, cache: model(ids(5, 3), past_key_values=cache),
    "other width": lambda model, cache: model(inputs_embeds=torch.randn(2, 3, 5), past_key_values=cache),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", CASES)
def test_after_wrong_arguments_the_cache_is_refused_or_unchanged(case: str, wrong: str):
    model, x_BT = build(case), ids(2, 3, seed=6)
    cache = filled(model)
    try:
        WRONG[wrong](model, cache)
    except Exception as error:  # also those of torch
        assert not isinstance(error, AssertionError)
    else:
        pytest.skip("this method accepts the call")
    try:
        found = model(x_BT, past_key_values=cache).logits
    except UserError as error:
        assert REFUSED in str(error)
    else:
        expected = model(x_BT, past_key_values=filled(model)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_call_that_is_refused_before_it_begins_leaves_the_cache_as_it_was():
    model, x_BT = build("PonderLM2(thoughts=1) with H2O"), ids(2, 3, seed=6)
    cache = filled(model)
    with pytest.raises(UserError, match="filled with 2 passes"):
        model(x_BT, past_key_values=cache, effort=0.0)
    found = model(x_BT, past_key_values=cache).logits
    assert torch.equal(found, model(x_BT, past_key_values=filled(model)).logits)

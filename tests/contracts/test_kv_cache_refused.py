"""What KV cache methods refuse: models, budgets, calls and files, each with words that help."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.cache_methods import EVICTING, REFUSED, SMALL, feed, memory, model, small
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import UserError


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_models_that_a_memory_does_not_fit_are_refused_in_words(name: str, family: str):
    with pytest.raises(UserError, match=name):
        small(name).cache(model(family))


@pytest.mark.parametrize("name", SMALL)
def test_a_cache_left_half_filled_is_refused(name: str):
    lm, x = model(), ids(1, 10)
    cache = small(name, lm).cache(lm)

    def fails(*_):
        raise RuntimeError("out of memory, say")

    handle = lm.get_decoder().layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm(x, past_key_values=cache)
    handle.remove()
    with pytest.raises(UserError, match="half of a call"):
        lm(x, past_key_values=cache)
    cache.reset()
    lm(x, past_key_values=cache)


@pytest.mark.parametrize("name", EVICTING)
def test_misuse_is_refused_in_words(name: str):
    lm, x = model(), ids(1, 30)
    cache = small(name, lm).cache(lm)
    lm(x, past_key_values=cache)
    coders = getattr(cache.layers[0], "coders", ())
    if not coders or any(codec.unit > 1 for codec in coders):  # a rollback can remove codes of single tokens
        with pytest.raises(UserError, match="activate_past_recording"):
            cache.crop(-3 if name != "KIVI" else -6)
    with pytest.raises(UserError, match="negative"):
        cache.crop(3)
    with pytest.raises(UserError, match="offloaded"):
        cache.offload(0)


def test_models_without_a_growing_cache_are_refused():
    config = copy.deepcopy(BACKBONES["mistral"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="nothing to compress"):
        memory("PreallocatedCache()").cache(lm)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("StreamingLLM(3)", "at least 5"),
        ("H2O(1.5)", "at most 1"),
        ("H2O('5 apples')", "units are"),
        ("H2O([0.5, 0.5])", "3 layers are compressed"),
        ("H2O([[4], [4], [4]])", "has length 1"),
        ("H2O(8, recent=1.5)", "share of the budget"),
        ("H2O(8, sinks=-1)", "0 or more"),
    ],
)
def test_budgets_that_do_not_fit_are_refused_in_words(text: str, says: str):
    with pytest.raises(UserError, match=says):
        memory(text).cache(model())


def test_what_is_no_cache_of_this_memory_and_model_is_refused(tmp_path: Path):
    lm, memory = model(), small("H2O")
    cache = memory.cache(lm)
    feed(lm, cache, ids(1, 12), [12])
    file = cache.save(tmp_path / "read.safetensors")
    with pytest.raises(UserError, match="contains a cache of H2O"):
        small("StreamingLLM").load_cache(lm, file)
    with pytest.raises(UserError, match="no such file"):
        memory.load_cache(lm, tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not a cache")
    with pytest.raises(UserError, match="not a saved cache"):
        memory.load_cache(lm, tmp_path / "text")
    with pytest.raises(UserError, match="another kind of model"):
        memory.load_cache(model("gemma3"), file)
    cache.activate_past_recording()
    feed(lm, cache, ids(1, 2), [2])
    with pytest.raises(UserError, match="contains draft tokens"):
        cache.save(file)
    cache.crop(0)
    cache.save(file)

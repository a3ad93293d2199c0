"""Caches of KV cache methods that are reset, saved, copied, or continued in another mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.architectures import ids
from helpers.cache_methods import FORMS, SMALL, feed, large, model, small

from pondera import UserError


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FORMS)
def test_a_cache_that_was_reset_is_as_new(name: str):
    lm, x = model(), ids(2, 12)
    cache = large(name, lm).cache(lm) if name not in SMALL else small(name, lm).cache(lm)
    first = feed(lm, cache, x, [10, 1, 1])
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(feed(lm, cache, x, [10, 1, 1]), first)


@pytest.mark.parametrize(("name", "family"), [(name, "llama") for name in FORMS] + [("H2O", "gemma3")])
def test_a_saved_cache_goes_on_as_if_it_had_never_left(name: str, family: str, tmp_path: Path):
    lm, x = model(family), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    cache, mask = memory.cache(lm), torch.ones(2, 30)
    mask[0, :3] = 0
    feed(lm, cache, x[:, :22], [18, 1, 1, 1, 1], mask[:, :22])
    again = memory.load_cache(lm, cache.save(tmp_path / "read.safetensors"))
    assert again.nbytes() <= cache.nbytes() and again.get_seq_length() == 22

    def rest(of) -> torch.Tensor:
        found = []
        for number in range(22, 30):
            position = (mask[:, : number + 1].sum(-1, keepdim=True) - 1).long()
            step = lm(
                x[:, number : number + 1],
                past_key_values=of,
                position_ids=position,
                attention_mask=mask[:, : number + 1],
            )
            found.append(step.logits)
        return torch.cat(found, 1)

    assert torch.equal(rest(cache), rest(again))


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_cache_from_inference_mode_is_continued_outside_of_it(name: str, crops: bool):
    lm, x = model(), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = memory.cache(lm)
        cache.activate_past_recording()
        with mode():
            feed(lm, cache, x[:, :20], [12, 8])
        if crops:
            cache.crop(-2)
        first = feed(lm, cache, x[:, 20:25], [1] * 5)
        with mode():
            feed(lm, cache, x[:, 25:27], [2])
        found.append(torch.cat([first, feed(lm, cache, x[:, 27:], [1] * 3)], 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", FORMS)
def test_a_copy_of_a_prefix_goes_on_and_leaves_the_prefix_as_it_is(name: str):
    lm, x = model(), ids(2, 30)
    memory = small(name, lm) if name in SMALL else large(name, lm)
    cache = memory.cache(lm)
    feed(lm, cache, x[:, :20], [18, 1, 1])
    copies = copy.deepcopy(cache), cache.clone()
    assert all(each.method is memory and each.owner is cache.owner for each in copies)
    found = [feed(lm, each, x[:, 20:], [1] * 10) for each in (*copies, cache)]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    with pytest.raises(UserError, match=r"cache\.save\(path\)"):
        pickle.dumps(cache)

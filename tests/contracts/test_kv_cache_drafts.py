"""KV cache methods in `generate`: draft tokens that are rolled back have no effect, and beam search works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import ids
from helpers.cache_methods import EVICTING, FORMS, SLOTS, SMALL, feed, kept, large, model, small, state

from pondera.methods.kv_cache.lazy_eviction import LazyEviction


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", SMALL)
def test_draft_tokens_that_are_rolled_back_have_no_effect(name: str):
    lm, x = model(), ids(2, 20)
    cache = small(name, lm).cache(lm)
    cache.activate_past_recording()
    feed(lm, cache, x[:, :12], [12])
    cache.crop(0)
    feed(lm, cache, x[:, 12:13], [1])
    cache.crop(0)
    before = [tensor.clone() for tensor in state(cache)]
    feed(lm, cache, x[:, 13:17], [4])
    cache.crop(-4)
    assert cache.get_seq_length() == 13
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before, strict=True))
    # Draft tokens that stay equal tokens from single calls.
    feed(lm, cache, x[:, 13:17], [4])
    cache.crop(-2)
    assert cache.get_seq_length() == 15 and all(max(map(max, layer)) == 14 for layer in kept(cache))


@pytest.mark.parametrize("name", EVICTING)
def test_recording_ends_with_two_calls_that_no_crop_follows(name: str):
    lm, x = model(), ids(2, 30)
    recorded, plain = (small(name, lm).cache(lm) for _ in range(2))
    feed(lm, plain, x[:, :12], [12])
    feed(lm, recorded, x[:, :12], [12])
    recorded.activate_past_recording()
    for number in range(12, 15):
        feed(lm, plain, x[:, number : number + 1], [1])
        feed(lm, recorded, x[:, number : number + 1], [1])
        recorded.crop(0)
    assert torch.equal(feed(lm, recorded, x[:, 15:], [1] * 15), feed(lm, plain, x[:, 15:], [1] * 15))
    assert all(torch.equal(*pair) for pair in zip(state(recorded), state(plain), strict=True))
    assert not any(layer.record_past for layer in recorded.kept)


@pytest.mark.parametrize("name", SLOTS)
def test_decoding_after_generate_with_drafts_keeps_the_budget(name: str):
    lm, x = model(), ids(1, 5).repeat(1, 4)
    cache = small(name, lm).cache(lm)
    options = dict(past_key_values=cache, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = lm.generate(x, max_new_tokens=6, prompt_lookup_num_tokens=3, **options)
    alone = small(name, lm).cache(lm)
    feed(lm, alone, found[:, :-1], [20, *[1] * 5])
    lm.generate(found, max_new_tokens=30, **options)
    feed(lm, alone, ids(1, 30), [1] * 30)
    heads = [[len(head) for layer in kept(each) for head in layer] for each in (cache, alone)]
    # Draft tokens change when the evictions come, which matters if they evict several tokens at once.
    at_once = small(name).window if isinstance(small(name), LazyEviction) else 1
    assert abs(sum(heads[0]) - sum(heads[1])) <= (at_once - 1) * len(heads[0])


@pytest.mark.parametrize("order", [[1, 0], [1], [0, 1, 1]], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_rows_are_selected_while_drafts_are_pending(name: str, order: list[int]):
    lm, x = model(), ids(2, 20, seed=5)
    found = []
    for before in (True, False):
        cache = small(name, lm).cache(lm)
        first = x[order] if before else x
        feed(lm, cache, first[:, :10], [10])
        cache.activate_past_recording()
        feed(lm, cache, first[:, 10:14], [4])
        if not before:
            cache.batch_select_indices(torch.tensor(order))
        cache.crop(-1)
        feed(lm, cache, x[order][:, 13:16], [3])
        cache.crop(0)
        found.append(feed(lm, cache, x[order][:, 16:], [1] * 4))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_prompt_lookup_with_room_for_all_is_greedy(name: str):
    lm, x = model(), ids(1, 5).repeat(1, 3)
    greedy = lm.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
    cache = large(name, lm).cache(lm)
    found = lm.generate(
        x, max_new_tokens=8, do_sample=False, pad_token_id=0, past_key_values=cache, prompt_lookup_num_tokens=3
    )
    assert torch.equal(found, greedy) and cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize("name", FORMS)
def test_beams_and_several_sequences(name: str):
    lm, x = model(), ids(2, 8)
    kwargs = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    expected = lm.generate(x, **kwargs)
    assert torch.equal(lm.generate(x, **kwargs, past_key_values=large(name, lm).cache(lm)), expected)

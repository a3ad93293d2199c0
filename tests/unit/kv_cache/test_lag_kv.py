"""LagKV: tokens that leave the range of the tokens after them are kept."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from helpers.architectures import ids, left_padded
from helpers.policy_reference import best, kept, model, run
from torch import Tensor
from transformers import DynamicCache

from pondera import UserError
from pondera.methods.kv_cache.lag_kv import LagKV, lag_score


def rows_of(x_1T: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values ``[T, D]`` of the stock model, by layer and KV head."""
    cache: Any = DynamicCache(config=model().config)
    model()(x_1T, past_key_values=cache)
    return [list(zip(layer.keys[0], layer.values[0], strict=True)) for layer in cache.layers]


def softmax(numbers: list[float]) -> list[float]:
    parts = [math.exp(number) for number in numbers]
    return [part / sum(parts) for part in parts]


def ranks(keys_TD: Tensor, values_TD: Tensor, sinks: int, lag: int) -> list[float]:
    """Reference implementation: for each token its rank within its partition, ``inf`` if no partition follows it."""
    T = len(keys_TD)
    found = [math.inf] * T
    for start in range(sinks, T - 2 * lag + 1, lag):
        total = [0.0] * lag
        for rows in (keys_TD, values_TD):
            low, high = rows[start + lag : start + 2 * lag].amin(0), rows[start + lag : start + 2 * lag].amax(0)
            normal = [((rows[t] - low) / (high - low)).tolist() for t in range(start, start + lag)]
            for place, part in enumerate(softmax([statistics.stdev(token) for token in normal])):
                total[place] += part
        for place in range(lag):
            found[start + place] = sum(total[other] < total[place] for other in range(lag)) / lag
    return found


@pytest.mark.parametrize(("tokens", "sinks", "lag", "budget"), [(40, 2, 6, 22), (45, 0, 5, 18), (41, 4, 8, 30)])
def test_it_keeps_the_highest_ranks_of_every_partition(tokens: int, sinks: int, lag: int, budget: int):
    x = ids(1, tokens)
    expected = [
        [best(ranks(keys, values, sinks, lag), budget, set(range(sinks))) for keys, values in layer]
        for layer in rows_of(x)
    ]
    assert kept(run(LagKV(budget, lag=lag, sinks=sinks), x, [tokens])) == expected


def test_partitions_keep_equally_many_tokens_and_the_last_stays_whole():
    x = ids(1, 44)  # 2 sinks, 4 partitions of 10, and 2 tokens
    for layer in kept(run(LagKV(2 + 3 * 4 + 12, lag=10, sinks=2), x, [44])):
        for head in layer:
            assert [sum(2 + 10 * n <= t < 12 + 10 * n for t in head) for n in range(4)] == [4, 4, 4, 10]
            assert {0, 1, *range(32, 44)} <= set(head)


def test_a_token_is_ranked_once_against_complete_partitions():
    """In decoding: the ranks of the stock keys decide, although most tokens of earlier partitions are gone."""
    x, lag, sinks, budget = ids(1, 60), 4, 1, 14
    cache = run(LagKV(budget, lag=lag, sinks=sinks), x, [20, *[1] * 40])
    # Only the first layer has the stock keys; those of later layers depend on the evicted tokens.
    for head, (keys, values) in zip(kept(cache)[0], rows_of(x)[0], strict=True):
        score = ranks(keys, values, sinks, lag)
        assert [t for t in head if score[t] == math.inf] == [0, *range(53, 60)]
        assert [t for t in head if score[t] < math.inf] == [t for t in range(60) if score[t] == (lag - 1) / lag][-6:]


def test_scores_do_not_depend_on_how_the_prompt_is_divided():
    x = ids(1, 37)
    caches = [run(LagKV(36, lag=5, sinks=2), x, pieces) for pieces in ([37], [20, 17], [36, 1], [7] * 5 + [2])]
    assert all(kept(cache) == kept(caches[0]) for cache in caches)
    for cache in caches:  # 36 of 37: the lowest rank, the oldest of equal ones
        assert torch.equal(cache.kept[0].tables[0].note["rank"], caches[0].kept[0].tables[0].note["rank"])  # type: ignore[attr-defined]


def test_a_padded_row_keeps_what_it_keeps_alone():
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 31, 23, 4)]
    x, mask = left_padded(rows)
    cache = LagKV(15, lag=5, sinks=2).cache(lm)
    lm(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, row in enumerate(rows):
        one = cache.clone()
        one.batch_select_indices(torch.tensor([number]))
        alone = kept(run(LagKV(15, lag=5, sinks=2), row[None], [len(row)]))
        assert [[[t - 40 + len(row) for t in head] for head in layer] for layer in kept(one)] == alone


def test_constant_channels_are_left_out():
    rows = torch.randn(1, 2, 12, 8)
    rows[..., 3] = 1.5
    rows[:, :, :4, 3] = torch.randn(1, 2, 4)  # in the first partition, whose next one is constant there
    others = [c for c in range(8) if c != 3]
    torch.testing.assert_close(lag_score(rows, 4), lag_score(rows[..., others], 4))
    assert torch.allclose(lag_score(torch.ones(1, 1, 8, 4), 4), torch.tensor(0.25))


@pytest.mark.parametrize(
    ("given", "said"), [({"lag": 1}, "lag=1"), ({"lag": True}, "lag=True"), ({"sinks": -1}, "sinks=-1")]
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        LagKV(512, **given)
    with pytest.raises(UserError, match="at least 271"):
        LagKV(270)

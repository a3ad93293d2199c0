"""SnapKV keeps what plain loops over the window's weights keep."""

from __future__ import annotations

import pytest
from helpers.architectures import ids
from helpers.policy_reference import best, kept, run, weights

from pondera import UserError
from pondera.methods.kv_cache.snap_kv import SnapKV


def expected(weight: list, count: int, window: int, kernel: int, pool: str) -> list[int]:
    """For one KV head: ``weight[r][i][j]`` of query head, query and key."""
    T = len(weight[0])
    score = [0.0] * T
    for head in weight:
        for query in range(T - window, T):
            for key in range(T - window):
                score[key] += head[query][key]
    reach = kernel // 2
    around = [[score[at] if 0 <= at < T else 0.0 for at in range(key - reach, key + reach + 1)] for key in range(T)]
    smooth = [max(near) if pool == "max" else sum(near) / kernel for near in around]
    return best(smooth, count, set(range(T - window, T)))


@pytest.mark.parametrize(("kernel", "pool"), [(1, "max"), (5, "max"), (5, "mean")])
def test_the_kept_set_is_that_of_plain_loops(kernel: int, pool: str):
    x = ids(1, 40)
    cache = run(SnapKV(14, window=6, kernel=kernel, pool=pool), x, [40])
    for layer, heads in zip(weights(x), kept(cache), strict=True):
        assert heads == [expected(head, 14, 6, kernel, pool) for head in layer]


def test_nothing_is_forgotten_in_decoding_and_a_later_prompt_is_cut_again():
    x = ids(1, 60)
    memory = SnapKV(12, window=4)
    cache = run(memory, x, [30, *[1] * 10])
    assert all(len(head) == 22 and head[-10:] == list(range(30, 40)) for layer in kept(cache) for head in layer)
    again = run(memory, x, [30, *[1] * 10, 20])
    assert all(len(head) == 12 and head[-4:] == [56, 57, 58, 59] for layer in kept(again) for head in layer)


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"pool": "median"}, {"window": 0}])
def test_what_cannot_be_pooled_is_refused_in_words(wrong: dict):
    with pytest.raises(UserError, match="kernel=4|pool|window=0"):
        SnapKV(12, **{"window": 4} | wrong)

"""TreeKV: one pair of neighbours competes for each token."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import kept, run

from pondera.methods.kv_cache.tree_kv import TreeKV, compete


def slowly(mean: list[float], count: int, limit: int, pair: int, sinks: int, recent: int) -> tuple[list[int], int]:
    """The rule in plain words: tokens come one by one, and one of a pair goes."""
    held = list(range(min(count, limit)))
    for token in range(len(held), count):
        held.append(token)
        older, newer = held[pair], held[pair + 1]
        held.remove(newer if mean[older] > mean[newer] else older)
        pair = sinks if pair + 2 > limit - recent else pair + 1
    return held, pair


def test_competition_is_that_of_the_plain_rule():
    draw = torch.Generator().manual_seed(0)
    mean, order = torch.rand(3, 2, 50, generator=draw), torch.arange(50).expand(3, 2, 50)
    count = torch.tensor([[50, 50], [31, 50], [6, 9]])
    limit = torch.tensor([[12, 20], [12, 12], [12, 8]])
    pair = torch.tensor([[2, 5], [2, 3], [2, 2]])
    held, after = compete(order, mean, count, limit, pair, sinks=2, recent=3)
    for b in range(3):
        for g in range(2):
            numbers = [int(one[b, g]) for one in (count, limit, pair)]
            expected, next_pair = slowly(mean[b, g].tolist(), *numbers, sinks=2, recent=3)
            assert held[b, g, : len(expected)].tolist() == expected and int(after[b, g]) == next_pair


def test_one_slot_of_the_pair_is_forgotten_with_each_token():
    x, memory = ids(1, 60), TreeKV(12, sinks=2, recent=2)
    before = kept(run(memory, x, [20]))
    for step in range(1, 12):
        cache = run(memory, x, [20, *[1] * step])
        for layer, (old, new) in enumerate(zip(before, kept(cache), strict=True)):
            for head in range(2):
                held = [*old[head], 19 + step]
                (lost,) = set(held) - set(new[head])
                pair = 2 + (8 + step - 1) % 8  # 8 competed in the prompt, and there are 8 pairs
                assert held.index(lost) in (pair, pair + 1), (layer, head, step)
        before = kept(cache)


def test_equal_scores_leave_a_pattern_that_is_denser_towards_the_end():
    order, ones = torch.arange(64).expand(1, 1, 64), torch.ones(1, 1, 64)
    sixteen = torch.tensor([[16]])
    held, _ = compete(order, ones, torch.tensor([[64]]), sixteen, torch.tensor([[0]]), sinks=0, recent=1)
    gaps = held[0, 0, :16].diff().tolist()
    assert sum(gaps[:8]) > 2 * sum(gaps[8:]), gaps


def test_smooth_retention_protects_sinks_and_recent_tokens():
    for layer in kept(run(TreeKV(10, sinks=3, recent=4), ids(1, 50), [40, *[1] * 10])):
        for head in layer:
            assert head[:3] == [0, 1, 2] and head[-4:] == [46, 47, 48, 49] and len(head) == 10


def test_a_budget_without_a_pair_is_refused_in_words():
    from pondera import UserError

    with pytest.raises(UserError, match="at least 6"):
        TreeKV(5, sinks=4, recent=1)

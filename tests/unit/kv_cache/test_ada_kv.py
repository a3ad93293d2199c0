"""AdaKV shares a layer's slots among its heads."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import kept, run

from pondera import UserError
from pondera.methods.kv_cache.ada_kv import AdaKV, shares
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.random_eviction import RandomEviction
from pondera.methods.kv_cache.snap_kv import SnapKV
from pondera.methods.kv_cache.token_select import TokenSelect


def test_shares_go_where_the_highest_scores_are():
    draw = torch.Generator().manual_seed(0)
    protected_score = torch.rand(2, 3, 20, generator=draw) * torch.tensor([1.0, 0.2, 3.0])[:, None]
    position = torch.arange(20).expand(2, 3, 20)
    count, even = torch.full((2, 3), 20), torch.full((2, 3), 8)
    found = shares(protected_score, position, count, even, 0.25)
    for row in range(2):
        heads = [sorted(protected_score[row, head].tolist(), reverse=True) for head in range(3)]
        expected = [2, 2, 2]  # a quarter of 8, and then the highest of what is left
        rest = sorted((-score, head) for head in range(3) for score in heads[head][2:])
        for _, head in rest[: 24 - 6]:
            expected[head] += 1
        assert found[row].tolist() == expected
    assert shares(protected_score, position, count, even, 1.0).tolist() == even.tolist()


def test_a_floor_of_1_is_the_policy_alone():
    x = ids(1, 50)
    for policy in (SnapKV(12, window=4), H2O(12)):
        assert kept(run(AdaKV(policy, safeguard=1.0), x, [30, *[1] * 20])) == kept(run(policy, x, [30, *[1] * 20]))


def test_heads_differ_the_sum_does_not_and_storage_is_freed():
    x = ids(1, 200)
    cache = run(AdaKV(SnapKV(24, window=4), safeguard=0.2), x, [200])
    sizes = [[len(head) for head in layer] for layer in kept(cache)]
    assert all(sum(layer) == 48 and min(layer) >= 4 for layer in sizes)
    assert any(len(set(layer)) > 1 for layer in sizes), sizes
    slot = 2 * 16 * 4 + 4 + 4  # key, value, position and note
    padding = 8  # the number of padding tokens of the batch row
    assert sum(layer.nbytes() - padding for layer in cache.kept) == slot * sum(map(sum, sizes))


def test_a_policy_that_forgets_in_decoding_shares_anew():
    for layer in kept(run(AdaKV(H2O(10), safeguard=0.3), ids(1, 60), [20, *[1] * 40])):
        assert sum(map(len, layer)) == 20 and all(set(range(55, 60)) <= set(head) for head in layer)


@pytest.mark.parametrize("policy", [TokenSelect(), H2O([[4, 5], [5, 4]]), AdaKV(RandomEviction(8))])
def test_what_has_no_budget_to_share_is_refused_in_words(policy):
    with pytest.raises(UserError, match="give a policy that ranks tokens"):
        AdaKV(policy)

"""The kernel evicts the slots that the operations of torch evict, and sums attention weights as they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.native_evict import received_natively
from pondera.kernels.build import library
from pondera.methods.kv_cache.common.policy import FEW, BudgetedPolicy, EvictionPolicy, _plain
from pondera.methods.kv_cache.critical_kv import CriticalKV
from pondera.methods.kv_cache.h2o import H2O

pytestmark = pytest.mark.skipif(library("evict") is None, reason="no compiler")


def table_of(seed: int, batch: int, heads: int, slots: int, pads: list[int]) -> KVStore:
    """Slots in random order, some of them empty, with scores of which some are equal."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, slots, generator=draw).argsort(-1).to(torch.int32)
    pads_B11 = torch.tensor(pads)[:, None, None]
    position = torch.where(order < pads_B11, -1 - order, order)
    position = position.masked_fill(torch.rand(position.shape, generator=draw) < 0.1, EMPTY)
    rows = torch.zeros(batch, heads, slots, 2)
    score = torch.randint(4, position.shape, generator=draw).float()
    return KVStore(rows, rows.clone(), position.to(torch.int32), {"received": score}, {"received": 0.0}, slots, False)


def layer_of(batch: int, slots: int, pads: list[int]) -> Any:
    padding = torch.tensor(pads)
    return SimpleNamespace(
        seen=slots,
        prompt=slots,
        index=0,
        among=1,
        state={"padding": padding},
        real_tokens=lambda from_prompt=False: (slots - padding).tolist(),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("batch", "heads", "slots"), [(1, 1, 9), (2, 3, 40), (3, 2, 133)])
@pytest.mark.parametrize("less", [0, 1, 3, 20])
@pytest.mark.parametrize(("recent", "sinks"), [(0.5, 0), (3, 2), (0, 4), (1.0, 0)])
def test_the_same_slots_are_evicted(seed: int, batch: int, heads: int, slots: int, less: int, recent: Any, sinks: int):
    pads = [(seed * row) % 3 for row in range(batch)]
    method = H2O(max(8, slots - slots // 10 - less), recent=recent, sinks=sinks)
    tables = [table_of(seed, batch, heads, slots, pads) for _ in range(2)]
    layer = layer_of(batch, slots, pads)
    found = EvictionPolicy.evict(method, layer, tables[0]), BudgetedPolicy.evict(method, layer, tables[1])
    assert found[0] == found[1]
    ours, theirs = ([sorted(head.tolist()) for head in table.position.clamp(min=-1).flatten(0, 1)] for table in tables)
    assert [[n for n in head if n >= 0] for head in ours] == [[n for n in head if n >= 0] for head in theirs]


def test_heads_with_different_limits_lose_different_numbers_of_slots():
    table, layer = table_of(3, 1, 2, 40, [0]), layer_of(1, 40, [0])
    count = table.real.sum(-1)[0].tolist()
    method = H2O([[count[0] - 1, count[1] - FEW]], recent=0.5)
    assert method.evict(layer, table)
    assert table.real.sum(-1)[0].tolist() == [count[0] - 1, count[1] - FEW]
    assert table.used == 40  # holes, for the next tokens


def test_a_method_with_rules_of_its_own_is_left_to_torch():
    assert _plain(H2O)
    assert not _plain(CriticalKV)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 3, 2, 37), (1, 2, 1, 1, 64)])
def test_weights_are_summed_as_by_softmax(shape: tuple[int, ...]):
    torch.manual_seed(0)
    score = 5 * torch.randn(shape)
    score = score.masked_fill(torch.rand(shape) < 0.3, -torch.inf)
    score[0, 0, 0, 0] = -torch.inf  # a query that may attend to no slot
    received = received_natively(score)
    assert received is not None
    torch.testing.assert_close(received, score.softmax(-1).nan_to_num(0).sum((2, 3)), rtol=1e-5, atol=1e-6)

"""RefreshKV: part of the past in most steps, all of it where the query has drifted."""

from __future__ import annotations

import torch
from helpers.architectures import ids
from helpers.policy_reference import model, run, weights

from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache
from pondera.methods.kv_cache.refresh_kv import RefreshKV


def parts(memory: RefreshKV, x: torch.Tensor, pieces: list[int], index: int = 0) -> list[list[list[int]] | None]:
    """The tokens that each KV head of a layer attends to in each call; none: all."""
    found, select = [], memory.select_kv

    def noted(layer, table, query, call):
        slot = select(layer, table, query, call)
        if layer.index == index:
            found.append(None if slot is None else [sorted(head[head >= 0].tolist()) for head in slot[0]])
        return slot

    memory.select_kv = noted
    run(memory, x, pieces)
    return found


def test_a_look_at_all_in_every_step_is_the_full_cache():
    lm, x = model(), ids(2, 30)
    always, full = (memory.cache(lm) for memory in (RefreshKV(4, stride=1, similarity=1.1), PreallocatedCache()))
    for piece in x.split([20, *[1] * 10], dim=1):
        assert torch.equal(lm(piece, past_key_values=always).logits, lm(piece, past_key_values=full).logits)


def test_the_part_is_the_best_of_the_pooled_last_row_and_then_the_new():
    x = ids(1, 30)
    found = parts(RefreshKV(8, stride=100, kernel=3), x, [24, *[1] * 6])
    assert found[0] is None
    for head, weight in enumerate(weights(x[:, :24])[0]):
        best = [max(max(r[-1][max(0, j - 1) : j + 2]) for r in weight) for j in range(24)]
        ranked = sorted(range(24), key=lambda j: (best[j], j), reverse=True)
        for step in range(1, 7):
            expected = sorted(ranked[: 8 - step] + list(range(24, 24 + step)))
            part = found[step]
            assert part is not None and part[head] == expected


def test_looks_come_every_stride_where_the_query_has_drifted():
    x = ids(1, 40)
    always = [part is None for part in parts(RefreshKV(8, stride=4, similarity=1.1), x, [24, *[1] * 16])]
    assert always == [True, *[False, False, False, True] * 4]
    never = [part is None for part in parts(RefreshKV(8, stride=4, similarity=-1.1), x, [24, *[1] * 16])]
    assert never == [True, *[False] * 16]
    some = [
        [part is None for part in parts(RefreshKV(8, stride=1, similarity=0.6), x, [24, *[1] * 16], i)] for i in (0, 1)
    ]
    assert some[0] != some[1], "each layer has its own steps"


def test_tokens_of_partial_steps_are_all_kept():
    cache = run(RefreshKV(4, stride=3), ids(1, 30), [20, *[1] * 10])
    for layer in cache.kept:
        assert isinstance(layer, KVStoreLayer) and layer.tables[0].position[0, 0].tolist() == list(range(30))

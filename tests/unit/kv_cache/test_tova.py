"""TOVA: the tokens that the latest query attends to are kept."""

from __future__ import annotations

import pytest
from helpers.architectures import ids
from helpers.policy_reference import best, kept, model, run, weights

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.tova import TOVA


def test_a_prompt_keeps_what_its_last_query_attends_to_over_all_heads():
    x = ids(1, 40)
    for layer, heads in zip(kept(run(TOVA(12, sinks=1), x, [40])), weights(x), strict=True):
        last = [query_head[-1] for group in heads for query_head in group]
        score = [sum(column) / 4 for column in zip(*last, strict=True)]
        assert layer == [best(score, 12, {0, 39})] * 2


class Recording(TOVA):
    """Stores what the latest query attended to before each eviction, by layer: the mean weight of each position."""

    def __init__(self) -> None:
        super().__init__(10)
        self.weight: dict[int, dict[int, float]] = {}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        weight_S = seen.weight_BGRTS[0, :, :, -1].mean((0, 1))
        self.weight[layer.index] = dict(zip(table.position[0, 0].tolist(), weight_S.tolist(), strict=True))
        super().observe(layer, table, seen)


def test_a_step_evicts_what_it_attended_to_least():
    recording = Recording()
    cache = run(recording, ids(1, 36), [30, 1, 1, 1, 1, 1, 1])
    for index, heads in enumerate(kept(cache)):
        weight = recording.weight[index]
        assert len(weight) == 11 and 35 in weight
        assert heads == [sorted(set(weight) - {min(set(weight) - {35}, key=weight.__getitem__)})] * 2


@pytest.mark.parametrize("stay", [1, 3])
def test_the_last_draft_that_stays_decides(stay: int):
    lm, x = model(), ids(1, 40)
    drafted, plain = (TOVA(10).cache(lm) for _ in range(2))
    for cache in (drafted, plain):
        lm(x[:, :30], past_key_values=cache)
    drafted.activate_past_recording()
    lm(x[:, 30:35], past_key_values=drafted)
    drafted.crop(stay - 5)
    lm(x[:, 30 : 30 + stay], past_key_values=plain)
    assert kept(drafted) == kept(plain)


def test_heads_with_budgets_of_their_own_average_over_their_own_query_heads():
    x = ids(1, 40)
    for layer, heads in zip(kept(run(TOVA([[9, 12], [7, 20]]), x, [40])), weights(x), strict=True):
        for head, group in zip(layer, heads, strict=True):
            score = [sum(column) / 2 for column in zip(*[query_head[-1] for query_head in group], strict=True)]
            assert head == best(score, len(head), {39})
    assert [[len(head) for head in layer] for layer in kept(run(TOVA([[9, 12], [7, 20]]), x, [40]))] == [
        [9, 12],
        [7, 20],
    ]

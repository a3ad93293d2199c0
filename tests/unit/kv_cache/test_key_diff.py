"""KeyDiff: keys that differ from the mean key are kept."""

from __future__ import annotations

from typing import Any

import torch
from helpers.architectures import ids, left_padded
from helpers.policy_reference import best, kept, model, run
from transformers import DynamicCache

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.key_diff import KeyDiff


def keys_of(x_1T: torch.Tensor) -> list[torch.Tensor]:
    """``[G, T, D]`` for each layer, of the stock model."""
    cache: Any = DynamicCache(config=model().config)
    model()(x_1T, past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


def distinct(keys_SD: torch.Tensor) -> list[float]:
    """Reference implementation of the score, one key at a time."""
    mean = torch.stack([key / key.norm() for key in keys_SD]).mean(0)
    return [-float(key @ mean / key.norm() / mean.norm()) for key in keys_SD]


def test_it_keeps_the_keys_least_similar_to_the_mean():
    x = ids(1, 40)
    expected = [[best(distinct(head), 12, {0, 38, 39}) for head in layer] for layer in keys_of(x)]
    assert kept(run(KeyDiff(12, recent=2, sinks=1), x, [40])) == expected


class Recording(KeyDiff):
    """Stores what is in the cache before each eviction, by layer: positions and keys."""

    def __init__(self) -> None:
        super().__init__(10)
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def score(self, layer: KVStoreLayer, table: KVStore) -> torch.Tensor:
        self.before[layer.index] = table.position[0].clone(), table.keys[0].clone()
        return super().score(layer, table)


def test_the_mean_is_that_of_the_slots_that_are_left():
    recording = Recording()
    cache = run(recording, ids(1, 35), [30, 1, 1, 1, 1, 1])
    for index, layer in enumerate(kept(cache)):
        for position, keys, held in zip(*recording.before[index], layer, strict=True):
            assert len(position) == 11
            score = dict(zip(position.tolist(), distinct(keys), strict=True))
            assert set(held) == set(score) - {min(score, key=score.__getitem__)}


def test_padding_is_not_in_the_mean():
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 23)]
    x, mask = left_padded(rows)
    cache = KeyDiff(9).cache(lm)
    lm(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert [[[t - 17 for t in head] for head in layer] for layer in kept(cache)] == kept(
        run(KeyDiff(9), rows[1][None], [23])
    )

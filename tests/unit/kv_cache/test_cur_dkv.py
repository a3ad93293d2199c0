"""CurDKV: tokens with a large share of the squared norms of keys and values in their window are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import ids, left_padded
from helpers.policy_reference import best, kept, model, run
from torch import Tensor
from transformers import DynamicCache

from pondera import UserError
from pondera.methods.kv_cache.cur_dkv import CurDKV


def shares(rows_TD: Tensor, window: int | None) -> list[float]:
    """Reference implementation, one token at a time."""
    squares, found = [float(row @ row) for row in rows_TD], []
    for t, square in enumerate(squares):
        first = 0 if window is None else t // window * window
        found.append(square / sum(squares[first : None if window is None else first + window]))
    return found


def rows_of(x_1T: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values ``[T, D]`` of the stock model, by layer and KV head."""
    cache: Any = DynamicCache(config=model().config)
    model()(x_1T, past_key_values=cache)
    return [list(zip(layer.keys[0], layer.values[0], strict=True)) for layer in cache.layers]


@pytest.mark.parametrize("window", [7, 16, None])
@pytest.mark.parametrize("combine", ["product", "mean", "key", "value"])
def test_it_keeps_the_largest_shares(window: int | None, combine: str):
    # Different tokens: in the first layer, keys of the same token have the same norm.
    x, expected = torch.randperm(model().config.vocab_size, generator=torch.Generator().manual_seed(0))[None, :41], []
    for layer in rows_of(x):
        heads = []
        for keys, values in layer:
            pairs = zip(shares(keys, window), shares(values, window), strict=True)
            score = [{"product": k * v, "mean": (k + v) / 2, "key": k, "value": v}[combine] for k, v in pairs]
            heads.append(best(score, 15, {0, 1}))
        expected.append(heads)
    assert kept(run(CurDKV(15, window=window, combine=combine, sinks=2), x, [41])) == expected


def test_a_random_matrix_makes_rows_narrower():
    x, width = ids(1, 40), model().config.head_dim
    matrix = torch.randn(width, 5, generator=torch.Generator().manual_seed(3)) / 5**0.5
    expected = [
        [
            best([k * v for k, v in zip(shares(keys @ matrix, 8), shares(values @ matrix, 8), strict=True)], 15, set())
            for keys, values in layer
        ]
        for layer in rows_of(x)
    ]
    assert kept(run(CurDKV(15, window=8, project=5, seed=3, sinks=0), x, [40])) == expected


def test_the_scale_of_a_head_changes_nothing():
    """Leverage scores do not change if a matrix is multiplied by a number."""
    lm, x = model(), ids(1, 40)
    before = kept(run(CurDKV(12), x, [40]))
    projections: Any = [layer.self_attn.v_proj.weight for layer in lm.get_decoder().layers[-1:]]
    for weight in projections:
        weight.mul_(3)
    try:
        assert kept(run(CurDKV(12), x, [40])) == before
    finally:
        for weight in projections:
            weight.div_(3)


def test_a_padded_row_keeps_what_it_keeps_alone():
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 23, 3)]
    x, mask = left_padded(rows)
    cache = CurDKV(9, window=6).cache(lm)
    lm(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, row in enumerate(rows):
        one = cache.clone()
        one.batch_select_indices(torch.tensor([number]))
        alone = kept(run(CurDKV(9, window=6), row[None], [len(row)]))
        assert [[[t - 40 + len(row) for t in head] for head in layer] for layer in kept(one)] == alone


def test_generated_tokens_stay():
    for layer in kept(run(CurDKV(10), ids(2, 46), [40, *[1] * 6])):
        assert all(len(head) == 16 and head[:4] == [0, 1, 2, 3] and head[-6:] == [*range(40, 46)] for head in layer)


@pytest.mark.parametrize(
    ("given", "said"), [({"combine": "sum"}, "combine"), ({"window": 0}, "window=0"), ({"project": 0}, "project=0")]
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        CurDKV(**given)

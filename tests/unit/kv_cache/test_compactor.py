"""Compactor: leverage scores of keys, and attention within chunks of the prompt that is not causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import ids, left_padded
from helpers.policy_reference import Watch, best, kept, model, run
from torch import Tensor
from transformers import DynamicCache

from pondera import UserError
from pondera.core import spec
from pondera.methods.kv_cache.compactor import Compactor, leverage_scores
from pondera.models.rotary import rotary_frequencies


def unrotated(rows_TD: Tensor) -> Tensor:
    """Keys before rotary embedding: each pair of coordinates is turned back by its position."""
    half, found = rows_TD.shape[1] // 2, rows_TD.clone()
    for position, row in enumerate(rows_TD):
        for pair, angle in enumerate((position * rotary_frequencies(model(), "")).tolist()):
            c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
            found[position, pair] = c * row[pair] + s * row[pair + half]
            found[position, pair + half] = c * row[pair + half] - s * row[pair]
    return found


def leverage(rows_TD: Tensor, ridge: float = 0.01) -> Tensor:
    """Reference implementation, one row at a time, with an inverse."""
    centered = (rows_TD - rows_TD.mean(0)).double()
    inverse = torch.linalg.inv(centered.T @ centered + ridge * torch.eye(rows_TD.shape[1]))
    return torch.stack([row @ inverse @ row for row in centered])


def attention(query_RTD: Tensor, keys_TD: Tensor, values_TD: Tensor, chunk: int) -> Tensor:
    """Reference implementation, one query at a time."""
    T = len(keys_TD)
    received = torch.zeros(T + 2)
    for query_TD in query_RTD:
        for t in range(T):
            first = t // chunk * chunk
            mates = slice(first, min(first + chunk, T))
            received[1:-1][mates] += (keys_TD[mates] @ query_TD[t]).softmax(0) / len(query_RTD)
    received[1:-1] *= values_TD.norm(dim=-1)
    return (received[:-2] + received[1:-1] + received[2:]) / 3


def expected(
    x_1T: Tensor, chunk: int, blending: float, sinks: int, recent: int, sketch_Dk: Tensor | None = None
) -> list:
    """Scores by layer, KV head and token."""
    watch, lm = Watch(), model()
    cache: Any = DynamicCache(config=lm.config)
    lm(x_1T, past_key_values=watch.cache(lm))
    lm(x_1T, past_key_values=cache)
    T, found = x_1T.shape[1], []
    middle = slice(sinks, T - recent)
    for number, layer in enumerate(cache.layers):
        by_attention, by_leverage = [], []
        for head in range(layer.keys.shape[1]):
            keys, values = layer.keys[0, head], layer.values[0, head]
            query = watch.seen[number].query_BGRTD[0, head]
            by_attention.append(attention(query[:, middle], keys[middle], values[middle], chunk))
            rows = unrotated(keys)[middle]
            by_leverage.append(leverage(rows if sketch_Dk is None else rows @ sketch_Dk))
        score = torch.zeros(len(by_attention), T)
        for parts, weight in ((by_attention, 1.0), (by_leverage, blending)):
            both = torch.stack([part.float() for part in parts])
            score[:, middle] += weight * (both - both.mean()) / both.std()
        found.append(score.tolist())
    return found


@pytest.mark.parametrize(
    ("tokens", "chunk", "blending", "sinks", "recent"),
    [(40, 8, 0.35, 4, 4), (40, 64, 0.0, 0, 0), (41, 10, 2.0, 3, 1), (40, 1, 1.0, 2, 2)],
)
def test_it_keeps_the_highest_blended_scores(tokens: int, chunk: int, blending: float, sinks: int, recent: int):
    x = ids(1, tokens)
    always = {*range(sinks), *range(tokens - recent, tokens)}
    method = Compactor(17, chunk=chunk, blending=blending, sinks=sinks, recent=recent, sketch=None)
    score = expected(x, chunk, blending, sinks, recent)
    assert kept(run(method, x, [tokens])) == [[best(head, 17, always) for head in layer] for layer in score]


def test_a_sketch_makes_keys_narrower():
    x, width = ids(1, 40), model().config.head_dim
    sketch_Dk = torch.randn(width, 3, generator=torch.Generator().manual_seed(7)) / 3**0.5
    method = Compactor(17, chunk=8, blending=3.0, sinks=2, recent=2, sketch=3, seed=7)
    score = expected(x, 8, 3.0, 2, 2, sketch_Dk)
    always = {0, 1, 38, 39}
    assert kept(run(method, x, [40])) == [[best(head, 17, always) for head in layer] for layer in score]
    exact = [Compactor(17, chunk=8, blending=3.0, sinks=2, recent=2, sketch=sketch) for sketch in (width, None)]
    assert kept(run(exact[0], x, [40])) == kept(run(exact[1], x, [40])) != kept(run(method, x, [40]))


def test_leverage_sums_to_the_rank_and_does_not_depend_on_a_basis():
    rows, there = torch.randn(1, 1, 30, 6).double(), torch.ones(1, 1, 30, dtype=torch.bool)
    score = leverage_scores(rows, there, ridge=1e-12)
    torch.testing.assert_close(score.sum(), torch.tensor(6.0).double())
    assert score.min() >= 0 and score.max() <= 1
    torch.testing.assert_close(leverage_scores(rows @ torch.randn(6, 6).double() + 5, there, ridge=1e-12), score)
    rows[0, 0, 4, 5] += 1000.0  # the only key of its direction
    assert leverage_scores(rows, there, ridge=1e-12)[0, 0].argmax() == 4


def test_rows_that_are_not_there_do_not_count():
    rows, there = torch.randn(2, 1, 20, 4), torch.rand(2, 1, 20) < 0.6
    for row in range(2):
        alone = rows[row : row + 1, :, there[row, 0]]
        whole = torch.ones(alone.shape[:3], dtype=torch.bool)
        torch.testing.assert_close(
            leverage_scores(rows, there)[row : row + 1, :, there[row, 0]], leverage_scores(alone, whole)
        )
        assert not leverage_scores(rows, there)[row, 0, ~there[row, 0]].any()


@pytest.mark.parametrize(
    "text", ["Compactor(0.4, chunk=6, sinks=2, recent=2)", "AdaKV(Compactor(9, chunk=6, sinks=2, recent=2))"]
)
def test_a_padded_row_keeps_what_it_keeps_alone(text: str):
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 23, 3)]
    x, mask = left_padded(rows)
    cache = spec.build(text, "kv_cache").cache(lm)
    lm(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, row in enumerate(rows):
        alone = spec.build(text, "kv_cache").cache(lm)
        lm(row[None], past_key_values=alone)
        one = cache.clone()
        one.batch_select_indices(torch.tensor([number]))
        assert [[[t - 40 + len(row) for t in head] for head in layer] for layer in kept(one)] == kept(alone)


def test_blocks_of_observed_queries_change_nothing(monkeypatch: pytest.MonkeyPatch):
    x, method = ids(2, 40), Compactor(12, chunk=9, sinks=2, recent=2)
    whole = run(method, x, [40])
    monkeypatch.setattr("pondera.cache.slot_layer.BLOCK", 400)
    assert kept(run(method, x, [40])) == kept(whole)


def test_heads_with_budgets_of_their_own_share_the_scale():
    """AdaKV stores each head in a table; with the whole budget safeguarded the tokens are those without it."""
    x = ids(1, 40)
    text = "Compactor(12, chunk=8, sinks=2, recent=2)"
    even = run(spec.build(f"AdaKV({text}, safeguard=1.0)", "kv_cache"), x, [40])  # type: ignore[arg-type]
    assert kept(even) == kept(run(spec.build(text, "kv_cache"), x, [40]))  # type: ignore[arg-type]


def test_generated_tokens_stay():
    cache: Any = run(Compactor(14), ids(2, 46), [40, *[1] * 6])
    for layer in kept(cache):
        for head in layer:
            assert len(head) == 20 and head[:8] == [*range(8)] and head[-10:] == [*range(36, 46)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": [[40, 80]]}, "AdaKV"),
        ({"chunk": 0}, "chunk=0"),
        ({"sketch": 0}, "sketch=0"),
        ({"recent": 0.5}, "recent=0.5"),
        ({"blending": -1}, "blending=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        Compactor(**given)


def test_models_without_rotary_positions_are_refused():
    with pytest.raises(UserError, match="use SnapKV"):
        Compactor().cache(model(2, "gpt2"))

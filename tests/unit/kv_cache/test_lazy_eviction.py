"""LazyEviction: the longest interval after which a token was attended to again, and evictions once in a window."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import best, kept, model, run, weights

from pondera import UserError
from pondera.methods.kv_cache.lazy_eviction import LazyEviction


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def scores(attended: list[list[bool]], first: int) -> list[float]:
    """Reference implementation, token by token: which steps (in order, beginning with query `first`) attended to it."""
    found = []
    for token in range(first + len(attended)):
        last, longest, now = None, 0, 0
        for step, row in enumerate(attended):
            if first + step < token:
                continue
            last, now = step - 1 if last is None else last, step
            if row[token]:
                longest, last = max(longest, step - last), step
        assert last is not None
        recurs = 2 * logistic(-1 - (now - last) / longest) + 2 * logistic(1 - longest) if longest else 0.0
        found.append(recurs)
    return found


def attended(x: torch.Tensor, threshold: float, queries: range) -> list[list[list[list[bool]]]]:
    """By layer, KV head and query: whether any query head attends to each token."""
    return [
        [
            [[max(head[t][s] for head in group) >= threshold for s in range(x.shape[1])] for t in queries]
            for group in layer
        ]
        for layer in weights(x)
    ]


@pytest.mark.parametrize(("window", "threshold"), [(12, 0.03), (5, 0.1), (8, 0.02)])
def test_it_keeps_what_recurs(window: int, threshold: float):
    x = ids(1, 40)
    expected = [
        [best(scores(rows, 40 - window), 26 - window + 1, {0, *range(40 - window, 40)}) for rows in layer]
        for layer in attended(x, threshold, range(40 - window, 40))
    ]
    assert kept(run(LazyEviction(26, window=window, threshold=threshold, sinks=1), x, [40])) == expected


def test_decoding_continues_the_intervals_of_the_prompt():
    """Nothing is evicted: the notes after single steps are those of the attention of all steps."""
    x, method = ids(1, 40), LazyEviction(64, window=6, threshold=0.08)
    cache: Any = run(method, x, [20, *[1] * 20])
    whole: Any = run(LazyEviction(64, window=26, threshold=0.08), x, [40])
    for layer, other, rows in zip(cache.kept, whole.kept, attended(x, 0.08, range(14, 40)), strict=True):
        (table,), (at_once,) = layer.tables, other.tables
        found = method.score(layer, table)[0]
        for head, one in zip(rows, found, strict=True):
            assert one.tolist() == pytest.approx(scores(head, 14), abs=1e-5)
        for name in ("age", "interval"):
            assert torch.equal(table.note[name], at_once.note[name])
        assert len(table.note["interval"].unique()) > 3


def test_scores_fall_with_the_wait_and_with_the_interval():
    """In steps since the last attention (rows) and longest intervals (columns); never attended to: 0."""
    age, interval = torch.meshgrid(torch.arange(0.0, 9), torch.arange(0.0, 6), indexing="ij")
    table: Any = SimpleNamespace(note={"age": age, "interval": interval})
    score = LazyEviction(255).score(cast(Any, None), table)
    assert not score[:, 0].any() and (score[1:, 1:] < score[:-1, 1:]).all()
    assert (score[0, 2:] < score[0, 1:-1]).all()
    # The wait counts in multiples of the longest interval.
    first = score - 2 * torch.sigmoid(1 - interval)
    torch.testing.assert_close(first[4, 4], first[2, 2])


def test_evictions_come_once_in_a_window_and_never_beyond_the_budget():
    x, held = ids(1, 60), []
    lm = model()
    cache: Any = LazyEviction(20, window=5, threshold=0.05).cache(lm)
    for piece in x.split([18, *[1] * 42], 1):
        lm(piece, past_key_values=cache)
        held.append(len(kept(cache)[0][0]))
    assert held[:4] == [18, 19, 20, 16] and max(held) == 20
    assert all(b == (16 if a == 20 else a + 1) for a, b in zip(held, held[1:], strict=False))
    assert all(set(range(55, 60)) <= set(head) for layer in kept(cache) for head in layer)


def test_blocks_of_observed_queries_change_nothing(monkeypatch: pytest.MonkeyPatch):
    x, method = ids(2, 40), LazyEviction(19, window=9, threshold=0.05)
    whole = run(method, x, [40])
    monkeypatch.setattr("pondera.cache.slot_layer.BLOCK", 700)
    assert kept(run(method, x, [40])) == kept(whole)


def test_a_recorded_prompt_is_observed_like_any_other():
    """Speculative decoding records the prompt, too, and then observes more of its queries."""
    x, lm, found = ids(1, 40), model(), []
    for recorded in (False, True):
        cache = LazyEviction(19, window=6, threshold=0.05).cache(lm)
        if recorded:
            cache.activate_past_recording()
        lm(x, past_key_values=cache)
        if recorded:
            cache.crop(0)
        found.append(kept(cache))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "said"), [({"window": 0}, "window=0"), ({"threshold": 0.0}, "threshold=0"), ({"sinks": -1}, "sinks=-1")]
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        LazyEviction(512, **given)
    with pytest.raises(UserError, match="at least 255"):
        LazyEviction(254)

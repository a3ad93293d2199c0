"""Benchmark of KV cache methods on one model: what the compressed cache of a long context still answers.

A method is judged by the share of what the context is worth that it keeps. A context is worth the nats by which it raises the
log-probability of the answers; all contexts of a kind of questions are taken together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pondera.core import spec
from pondera.core.errors import UserError, unknown
from pondera.core.run_folder import write_atomic
from pondera.data.questions.base import AskedContext, Questions
from pondera.evaluation.kv_sweep import FULL, ready, table_bytes
from pondera.evaluation.question_score import (
    ContextScore,
    encode,
    score_context,
    score_known,
    score_turns,
    score_turns_without,
    score_without,
)
from pondera.inference.load import Loaded
from pondera.methods.kv_cache.base import KVCacheMethod

QUESTIONS = ("Needles()", "FewShot()", "Continuation()")
METHODS = (
    *(
        "RandomEviction(0.25)",
        "StreamingLLM(0.25)",
        "H2O(0.25)",
        "SnapKV(0.25)",
        "ExpectedAttention(0.25)",
        "KVzip(0.25)",
    ),
    *("KIVI(4)", "KIVI(2)"),
)
ORDERS = {"after": score_context, "before": score_known, "in-turns": score_turns}
"""When questions are asked, and how they are scored then."""
NONE = "no context"
TIMED = 2
"""How many contexts the time of a decoding step is measured after."""
DRAWS = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Args:
        questions: spec strings of `pondera.data.questions`.
        methods: spec strings of KV cache methods.
        tokens: the length of a context.
        contexts: how many contexts of each kind of questions.
        seed: of contexts and questions.
        ask: when questions are asked, one of `ORDERS`: each ``after`` the context was compressed, on a copy of the cache; each
            read ``before`` the cache is compressed, which takes a prefill per question; or ``in-turns``, as a conversation
            of which only the first question was read before.
    """

    questions: tuple[str, ...] = QUESTIONS
    methods: tuple[str, ...] = METHODS
    tokens: int = 2048
    contexts: int = 8
    seed: int = 0
    ask: str = "after"

    def __post_init__(self) -> None:
        if self.ask not in ORDERS:
            raise unknown("ask", self.ask, ORDERS)


@dataclass(frozen=True)
class BenchRow:
    """A method on a kind of questions.

    Args:
        questions: spec string of the questions.
        method: spec string of the method.
        items: how many questions.
        kept: share of the context's worth in nats that is kept; `None` if the context is worth nothing to this model.
        kept_interval: its 95 % interval, by bootstrap over the contexts.
        right: share of the answers that greedy decoding gives.
        right_interval: its 95 % interval.
        cache_bytes: mean bytes of the cache of a context.
        of_full: the same as a share of the full cache.
        table_bytes: bytes of the calibrated tables, once per model.
        prefill_seconds: median time to read and compress a context.
        step_seconds: median time of a decoding step after it.
    """

    questions: str
    method: str
    items: int
    kept: float | None
    kept_interval: tuple[float, float] | None
    right: float
    right_interval: tuple[float, float]
    cache_bytes: float
    of_full: float
    table_bytes: int
    prefill_seconds: float
    step_seconds: float


def bench(
    loaded: Loaded,
    settings: BenchSettings | None = None,
    calibration: Sequence[Tensor] = (),
    store: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[BenchRow]:
    """Measures all methods on all questions; the full cache and no context at all come first.

    Args:
        loaded: the model.
        settings: what is measured; default: `None`, the defaults.
        calibration: token ids ``[B, T]`` for methods that are fitted.
        store: a JSON file that keeps every finished row; a file of the same settings is continued.
        say: receives progress messages.

    Raises:
        UserError: a method or kind of questions that does not exist or does not fit, or `store` has other settings.

    Example::

        rows = bench(load("smollm2"), BenchSettings(methods=("SnapKV(0.25)",), contexts=4))
        print(rows[-1].kept, rows[-1].of_full)
    """
    it = settings or BenchSettings()
    names = list(dict.fromkeys([FULL, *(spec.format(spec.parse(text)) for text in it.methods)]))
    for text in it.questions:  # fails before anything is measured
        spec.build(text, "questions")
    methods = {text: ready(loaded.model, text, calibration, say) for text in names}
    stored = _Store(store, {"model": loaded.name, "dtype": _dtype(loaded), "torch": torch.__version__, **asdict(it)})
    rows: list[BenchRow] = []
    for text in it.questions:
        asked = contexts(loaded, it, text)
        scores = {NONE: stored.scores(text, NONE, lambda asked=asked: _without(loaded, methods[FULL], asked, it.ask))}
        for name, method in methods.items():
            began = time.perf_counter()
            scores[name] = stored.scores(
                text, name, lambda asked=asked, method=method: _scores(loaded, method, asked, it.ask)
            )
            rows.append(_row(text, name, method, scores))
            say(f"{text} {name}: {_said(rows[-1])} ({time.perf_counter() - began:.0f} s)")
    return rows


def contexts(loaded: Loaded, settings: BenchSettings, questions: str) -> list[AskedContext]:
    """The contexts of one kind of questions, with the questions about them."""
    kind: Questions = spec.build(questions, "questions")
    return kind.draw(lambda part: len(encode(loaded, part, False)), settings.tokens, settings.contexts, settings.seed)


def _dtype(loaded: Loaded) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _scores(loaded: Loaded, method: KVCacheMethod, asked: Sequence[AskedContext], ask: str) -> list[ContextScore]:
    return [ORDERS[ask](loaded, method, one, timed=number < TIMED) for number, one in enumerate(asked)]


def _without(loaded: Loaded, full: KVCacheMethod, asked: Sequence[AskedContext], ask: str) -> list[ContextScore]:
    if ask == "in-turns":
        return [score_turns_without(loaded, full, one) for one in asked]
    return [score_without(loaded, one) for one in asked]


class _Store:
    """The scores on disk."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.tree = path, {"settings": json.loads(json.dumps(settings)), "scores": {}}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            before = found["settings"]
            found["scores"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a file of pondera bench; give another one") from None
        differ = [key for key in self.tree["settings"] if key not in ("methods", "questions")]
        for key in differ:
            if before.get(key) != self.tree["settings"][key]:
                raise UserError(
                    f"{path} has {key} {before.get(key)!r}, and {self.tree['settings'][key]!r} is asked for; give another file"
                )
        self.tree["scores"] = found["scores"]

    def scores(self, questions: str, method: str, measure: Callable[[], list[ContextScore]]) -> list[ContextScore]:
        """The stored scores, or new ones, which are stored."""
        of_kind = self.tree["scores"].setdefault(questions, {})
        if method not in of_kind:
            of_kind[method] = [asdict(score) for score in measure()]
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, json.dumps(self.tree, indent=1))
        return [ContextScore(**one | {key: tuple(one[key]) for key in ("nats", "right")}) for one in of_kind[method]]


def _row(questions: str, name: str, method: KVCacheMethod, scores: dict[str, list[ContextScore]]) -> BenchRow:
    own, full = scores[name], scores[FULL]
    kept, kept_interval = kept_share(own, scores[NONE], full)
    counts = np.array([len(one.nats) for one in own])
    right = np.array([sum(one.right) for one in own])
    size = float(np.mean([one.cache_bytes for one in own]))
    return BenchRow(
        questions=questions,
        method=name,
        items=int(counts.sum()),
        kept=kept,
        kept_interval=kept_interval,
        right=float(right.sum() / counts.sum()),
        right_interval=_interval(right, counts),
        cache_bytes=size,
        of_full=size / float(np.mean([one.cache_bytes for one in full])),
        table_bytes=table_bytes(method),
        prefill_seconds=float(np.median([one.prefill_seconds for one in own])),
        step_seconds=float(np.median([one.step_seconds for one in own[:TIMED]])),
    )


def kept_share(
    own: Sequence[ContextScore], without: Sequence[ContextScore], full: Sequence[ContextScore]
) -> tuple[float | None, tuple[float, float] | None]:
    """The share of the contexts' worth in nats that is kept, and its 95 % interval; `None` if they are worth nothing.

    Args:
        own: the scores of a method.
        without: those without the contexts.
        full: those with the full cache.

    Example:
        >>> none, full = [ContextScore((-8.0,), (False,))], [ContextScore((-2.0,), (True,))]
        >>> kept_share([ContextScore((-5.0,), (False,))], none, full)
        (0.5, (0.5, 0.5))
    """
    nats, none, most = (np.array([sum(one.nats) for one in scores]) for scores in (own, without, full))
    gained, worth = nats - none, most - none
    if worth.sum() <= 0:
        return None, None
    return float(gained.sum() / worth.sum()), _interval(gained, worth)


def _interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of sum(above) / sum(below), by bootstrap over the contexts."""
    drawn = np.random.default_rng(0).integers(len(above), size=(DRAWS, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above[drawn].sum(1) / below[drawn].sum(1)
    low, high = np.nanquantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _said(row: BenchRow) -> str:
    kept = "the context is worth nothing" if row.kept is None else f"{100 * row.kept:.0f} % kept"
    return f"{kept}, {100 * row.right:.0f} % right, {100 * row.of_full:.1f} % of the bytes"

"""What a KV cache is for: the methods that fit a use, how they are measured there, and which one to take within a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.evaluation.kv_bench import BenchRow, BenchSettings, bench
from pondera.evaluation.kv_sweep import FULL
from pondera.inference.load import Loaded

ENOUGH = 0.95
"""Without a budget, the smallest cache is taken that keeps at least this share of what the best one keeps."""
SLACK = 1.02
"""A cache may exceed the budget by 2 %: positions and exact tokens are counted, and shares are rounded."""
QUESTIONS = ("Needles()", "FewShot()")
TOKENS, LEAST, QUESTION = 1024, 256, 128
"""Tokens of a context, the fewest of them, and positions that are left for a question and its answer."""


@dataclass(frozen=True)
class Use:
    """One way to use a cache.

    Args:
        about: when it is this use.
        ask: when questions are asked, see `pondera.evaluation.kv_bench.ORDERS`.
        methods: spec strings for a budget, a share of the bytes in 16 bits per number.
    """

    about: str
    ask: str
    methods: Callable[[float], tuple[str, ...]]


def _for_questions(share: float) -> tuple[str, ...]:
    policies = tuple(f"{name}({share:g})" for name in ("KVzip", "ExpectedAttention", "KeyDiff"))
    return (*policies, *_coded("KVzip", share), *_codes(share))


def _for_prompts(share: float) -> tuple[str, ...]:
    policies = tuple(f"{name}({share:g})" for name in ("SnapKV", "TOVA", "KVzip"))
    return (*policies, f"CriticalKV(SnapKV({share:g}))", *_coded("SnapKV", share), *_codes(share))


def _coded(policy: str, share: float) -> tuple[str, ...]:
    """Twice the slots at 5 of 16 bits."""
    return (f"Coded({policy}({2 * share:g}), KIVI(4, window=32))",) if 2 * share < 1 else ()


def _codes(share: float) -> tuple[str, ...]:
    """Codes alone, if they can fit: 5 of 16 bits, or 3."""
    fitting = (("KIVI(4, window=32)", 5 / 16), ("KIVI(2, window=32)", 3 / 16))
    return tuple(text for text, least in fitting if least <= share)


USES = {
    "questions": Use(
        "a long context is read once, and questions that were not known then follow", "after", _for_questions
    ),
    "prompts": Use("each long prompt ends with its own question", "before", _for_prompts),
    "chat": Use(
        "a conversation about a long context, of which only the first question was known", "in-turns", _for_questions
    ),
}


@dataclass(frozen=True)
class Measured:
    """A method at a use, over all kinds of questions.

    Args:
        method: its spec string.
        of_full: bytes of the cache as a share of the full cache.
        kept: mean share of the context's worth that is kept.
        right: share of the questions that greedy decoding answers.
        prefill_seconds: to read and compress a context.
        step_seconds: of a decoding step.
        rows: the rows of each kind of questions.
    """

    method: str
    of_full: float
    kept: float
    right: float
    prefill_seconds: float
    step_seconds: float
    rows: tuple[BenchRow, ...]


def share_of(budget: str | float) -> float:
    """The budget as a share.

    Raises:
        UserError: it is not a share between 0 and 1.

    Example:
        >>> share_of("25%"), share_of(0.25)
        (0.25, 0.25)
    """
    found = re.fullmatch(r"([0-9.]+)\s*(%?)", str(budget).strip())
    try:
        share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"budget={budget!r}: give a share of the full cache, such as 25% or 0.25")
    return share


def find_use(name: str) -> Use:
    """The use of this name.

    Raises:
        UserError: there is none.
    """
    if name not in USES:
        raise unknown("use", name, USES)
    return USES[name]


def measure(
    loaded: Loaded,
    use: str,
    budget: float | None,
    *,
    methods: Sequence[str] = (),
    tokens: int | None = None,
    contexts: int = 4,
    calibration: Sequence[Tensor] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measures the methods of a use, the full cache first.

    Args:
        loaded: the model.
        use: a key of `USES`.
        budget: a share of the full cache; `None`: a quarter and an eighth.
        methods: spec strings in place of those of the use.
        tokens: length of a context; default: `None`, 1,024 or what the positions of the model allow.
        contexts: number of contexts of each kind of questions.
        calibration: token ids for methods that are fitted.
        say: receives progress messages.

    Raises:
        UserError: the use does not exist, or a method does not fit the model.
    """
    it = find_use(use)
    texts = tuple(methods) or tuple(
        dict.fromkeys(text for share in ([budget] if budget else [0.25, 0.125]) for text in it.methods(share))
    )
    room = (loaded.model.positions or TOKENS + QUESTION) - QUESTION
    if tokens is None and room < LEAST:
        raise UserError(
            f"this model has {loaded.model.positions} positions, and contexts with their questions need {LEAST + QUESTION}; "
            "give fewer tokens, or measure it on text, without a use"
        )
    settings = BenchSettings(QUESTIONS, texts, tokens or min(TOKENS, room), contexts, ask=it.ask)
    by_method: dict[str, list[BenchRow]] = {}
    for row in bench(loaded, settings, calibration, say=say):
        by_method.setdefault(row.method, []).append(row)
    return [_measured(rows) for rows in by_method.values()]


def _measured(rows: Sequence[BenchRow]) -> Measured:
    def mean(name: str) -> float:
        return float(np.mean([value for row in rows if (value := getattr(row, name)) is not None] or [0.0]))

    numbers: dict[str, Any] = {
        name: mean(name) for name in ("of_full", "kept", "right", "prefill_seconds", "step_seconds")
    }
    return Measured(method=rows[0].method, rows=tuple(rows), **numbers)


def choose(found: Sequence[Measured], budget: float | None) -> Measured:
    """The method to take: the one that keeps most within the budget, or the smallest that keeps nearly what the best does.

    Args:
        found: as from `measure`.
        budget: a share of the full cache, or `None`.

    Raises:
        UserError: no method is within the budget.
    """
    others = [one for one in found if one.method != FULL]
    if budget is not None:
        fitting = [one for one in others if one.of_full <= SLACK * budget]
        if not fitting:
            least = min(others, key=lambda one: one.of_full)
            raise UserError(
                f"budget: no method was within {100 * budget:g} % of the bytes; the smallest cache is that of "
                f"{least.method}, {100 * least.of_full:.1f} %; give a larger budget, or longer contexts"
            )
        return max(fitting, key=lambda one: one.kept)
    best = max(one.kept for one in others)
    return min((one for one in others if one.kept >= min(ENOUGH * best, best)), key=lambda one: one.of_full)

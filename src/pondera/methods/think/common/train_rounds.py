"""The number of Jacobi rounds in each step of a training: drawn from a range, or growing with the training.

A range is (minimum, maximum): each step draws a number, all of them equally likely. A schedule is (share, rounds), ...: from
this share of the training on, this number of rounds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pondera.core.errors import UserError


def checked_rounds(train_rounds: Any) -> tuple:
    """Returns the setting of a method as tuples.

    Raises:
        UserError: it is neither a range nor a schedule.

    Example:
        >>> checked_rounds([2, 3]), checked_rounds([[0, 1], [0.5, 3]])
        ((2, 3), ((0, 1), (0.5, 3)))
    """
    if isinstance(train_rounds, Sequence) and not isinstance(train_rounds, str):
        parts = tuple(tuple(part) if isinstance(part, (list, tuple)) else part for part in train_rounds)
        if _is_range(parts) or _is_schedule(parts):
            return parts
    raise UserError(
        f"train_rounds={train_rounds!r}: give (minimum, maximum), such as (2, 3), or (share of the training, rounds) for "
        "every change, with shares that ascend from 0 and stay below 1, such as ((0, 1), (0.3, 2), (0.7, 4))"
    )


def rounds_at(train_rounds: tuple, step: int, seed: int, progress: float) -> int:
    """The number of rounds of a step; it depends on nothing else, so all ranks and micro-batches use the same number.

    Args:
        train_rounds: from `checked_rounds`.
        step, seed, progress: see `Method.begin_step`.

    Example:
        >>> [rounds_at(((0, 1), (0.3, 2), (0.7, 4)), 0, 0, progress) for progress in (0.0, 0.29, 0.3, 0.9)]
        [1, 1, 2, 4]
    """
    schedule = _scheduled(train_rounds)
    if schedule is None:
        return random.Random(f"{seed}:{step}").randint(*train_rounds)
    return [rounds for share, rounds in schedule if share <= progress][-1]


def mean_rounds(train_rounds: tuple) -> float:
    """The mean number of rounds over the training, for cost estimates.

    Example:
        >>> mean_rounds((2, 3)), round(mean_rounds(((0, 1), (0.3, 2), (0.7, 4))), 3)
        (2.5, 2.3)
    """
    schedule = _scheduled(train_rounds)
    if schedule is None:
        return sum(train_rounds) / 2
    ends = [share for share, _ in schedule[1:]] + [1.0]
    return sum((end - share) * rounds for (share, rounds), end in zip(schedule, ends, strict=True))


def _scheduled(train_rounds: tuple) -> tuple | None:
    return train_rounds if isinstance(train_rounds[0], tuple) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_range(parts: tuple) -> bool:
    return len(parts) == 2 and all(map(_is_count, parts)) and parts[0] <= parts[1]


def _is_schedule(parts: tuple) -> bool:
    if not parts or not all(isinstance(part, tuple) and len(part) == 2 and _is_count(part[1]) for part in parts):
        return False
    shares = [share for share, _ in parts]
    if not all(isinstance(share, (int, float)) for share in shares) or shares[0] != 0:
        return False
    return all(before < after < 1 for before, after in zip(shares, shares[1:], strict=False))

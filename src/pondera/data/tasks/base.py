"""Task: the base class of synthetic tasks whose difficulty is known for every token.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from pondera.core.errors import UserError
from pondera.core.spec_repr import SpecRepr

IGNORED = -100
"""Target of a token that is not scored, as in transformers."""
NO_DIFFICULTY = -1
"""Difficulty of a token that is not scored."""
FILL = "<|endoftext|>"
"""The symbol that fills a window; its token id is 0."""


@dataclass(frozen=True)
class TaskSamples:
    """Windows of a task.

    Args:
        ids_NC: token ids, int64.
        targets_NC: the token that the model must predict at each position; `IGNORED` where it is not scored.
        difficulty_NC: the number of serial steps that the target needs; `NO_DIFFICULTY` where it is not scored.
    """

    ids_NC: np.ndarray
    targets_NC: np.ndarray
    difficulty_NC: np.ndarray


@dataclass(frozen=True)
class Item:
    """One problem of a task that puts several problems into a window.

    Args:
        symbols: the symbols of the problem and of its answer.
        answers: for each symbol, the symbol that must be predicted there, or `None`.
        difficulty: for each symbol, the serial steps that its answer needs; ignored where there is none.
    """

    symbols: Sequence[str]
    answers: Sequence[str | None]
    difficulty: Sequence[int]


class Task(SpecRepr, ABC):
    """Base class of tasks. A task draws windows of symbols; every symbol is one token.

    `solve` is an independent solver: plain Python that reads the symbols and computes the answers without the tables of
    `sample`. The tests hold the two equal on every task of this folder.
    """

    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the tests."""

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """All symbols except `FILL`, in the order of their token ids, from 1."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """The number of possible answers; a guess is right with the probability 1 / `answers`."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """Draws windows.

        Args:
            rng: the source of randomness; equal states give equal windows.
            count: N.
            context: C.

        Raises:
            UserError: a window of this length cannot contain a problem.
        """

    @abstractmethod
    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """The answer at each position of a window, or `None` where nothing is asked."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """The token id of each symbol, `FILL` included."""
        return {symbol: number for number, symbol in enumerate((FILL, *self.symbols))}

    def packed(self, windows: Iterable[Sequence[Item]], context: int) -> TaskSamples:
        """Puts the problems of each window one after another; the rest of the window is `FILL`.

        Args:
            windows: for each window, its problems; together they have at most `context` symbols.
            context: C.
        """
        rows = [self._row(items, context) for items in windows]
        ids_NC, targets_NC, difficulty_NC = (
            np.array(part, np.int64).reshape(-1, context) for part in zip(*rows, strict=True)
        )
        return TaskSamples(ids_NC, targets_NC, difficulty_NC)

    def _row(self, items: Sequence[Item], context: int) -> tuple[list[int], list[int], list[int]]:
        symbols = [symbol for item in items for symbol in item.symbols]
        answers = [answer for item in items for answer in item.answers]
        steps = [number for item in items for number in item.difficulty]
        rest = context - len(symbols)
        ids = [self.ids[symbol] for symbol in symbols] + [0] * rest
        targets = [IGNORED if answer is None else self.ids[answer] for answer in answers] + [IGNORED] * rest
        asked = [NO_DIFFICULTY if answer is None else number for answer, number in zip(answers, steps, strict=True)]
        return ids, targets, asked + [NO_DIFFICULTY] * rest


def at_least(name: str, value: int, least: int, most: int | None = None) -> int:
    """Returns `value`.

    Raises:
        UserError: it is below `least` or above `most`.
    """
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"{name}={value}: give {allowed}")
    return value


def share(name: str, value: float) -> float:
    """Returns `value`.

    Raises:
        UserError: it is not a share from 0 to 1.
    """
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value}: give a share from 0 to 1")
    return value


def check_context(task: Task, context: int, needed: int) -> None:
    """Raises if a window is too short for one problem.

    Raises:
        UserError: `context` is below `needed`.
    """
    if context < needed:
        raise UserError(f"data.context: {context} tokens cannot contain one problem of {task!r}; give {needed} or more")

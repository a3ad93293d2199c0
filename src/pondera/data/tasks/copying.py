"""Copying: repeats a random string. A control without serial steps.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import Task, TaskSamples, at_least, check_context

COPY = "|"


class Copying(Task):
    """Repeats a string of random letters after a separator; a control, because one look-up answers every token.

    Every copied token has the difficulty 1. If extra passes help here, they do not help because they are serial.

    Source: the copying task of "Repeat after me", arXiv 2402.01032.

    Args:
        letters: the number of different letters, from 2 to 1,000.

    Example:
        >>> Copying(letters=3).solve(["a0", "a2", "|", "a0", "a2"])
        [None, None, 'a0', 'a2', None]
    """

    paper: ClassVar[str] = "copying, arXiv 2402.01032"
    examples: ClassVar[dict[str, str]] = {"some": "Copying(letters=8)"}

    def __init__(self, letters: int = 16) -> None:
        self.letters = at_least("letters", letters, 2, 1000)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The letters, then the separator."""
        return (*(f"a{number}" for number in range(self.letters)), COPY)

    @property
    def answers(self) -> int:
        """The number of letters."""
        return self.letters

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`. The string is half of the window."""
        check_context(self, context, 3)
        length = (context - 1) // 2
        letter_NL = 1 + rng.integers(self.letters, size=(count, length))
        ids_NC = np.zeros((count, context), np.int64)
        targets_NC, difficulty_NC = np.full_like(ids_NC, -100), np.full_like(ids_NC, -1)
        ids_NC[:, :length] = ids_NC[:, length + 1 : 2 * length + 1] = letter_NL
        ids_NC[:, length] = 1 + self.letters
        targets_NC[:, length : 2 * length], difficulty_NC[:, length : 2 * length] = letter_NL, 1
        return TaskSamples(ids_NC, targets_NC, difficulty_NC)

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`."""
        length = list(symbols).index(COPY)
        answers: list[str | None] = [None] * len(symbols)
        answers[length : 2 * length] = symbols[:length]
        return answers

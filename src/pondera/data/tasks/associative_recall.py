"""Associative recall: the value that was paired with a key. A control without serial steps.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import Item, Task, TaskSamples, at_least, check_context

ASK = "?"


class AssociativeRecall(Task):
    """Reads pairs of keys and values, then predicts the value of each key that is asked; a control.

    A window lists n pairs with new random values, then asks for keys. One look-up answers every question, so each has the
    difficulty 1.

    Source: associative recall as in "Zoology", arXiv 2312.04927.
    When not to use it: as a control on a model of one layer. A value must first attend to the key before it, so the look-up
    needs two layers or two passes.

    Args:
        pairs: n, from 1 to 256.
        values: the number of different values, from 2 to 1,000.

    Example:
        >>> AssociativeRecall(pairs=2, values=3).solve(["k1", "v0", "k0", "v2", "?", "k1"])
        [None, None, None, None, None, 'v0']
    """

    paper: ClassVar[str] = "associative recall, arXiv 2312.04927"
    examples: ClassVar[dict[str, str]] = {"some": "AssociativeRecall(pairs=4, values=5)"}

    def __init__(self, pairs: int = 8, values: int = 16) -> None:
        self.pairs, self.values = at_least("pairs", pairs, 1, 256), at_least("values", values, 2, 1000)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The keys, the values, then the question mark."""
        return (*(f"k{key}" for key in range(self.pairs)), *(f"v{value}" for value in range(self.values)), ASK)

    @property
    def answers(self) -> int:
        """The number of values."""
        return self.values

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`. Questions fill the window after the pairs."""
        check_context(self, context, 2 * self.pairs + 2)
        questions = (context - 2 * self.pairs) // 2
        return self.packed((self._window(rng, questions) for _ in range(count)), context)

    def _window(self, rng: np.random.Generator, questions: int) -> list[Item]:
        value_of = rng.integers(self.values, size=self.pairs)
        pairs = [symbol for key in rng.permutation(self.pairs) for symbol in (f"k{key}", f"v{value_of[key]}")]
        asked = rng.integers(self.pairs, size=questions)
        answers = [Item([ASK, f"k{key}"], [None, f"v{value_of[key]}"], [0, 1]) for key in asked]
        return [Item(pairs, [None] * len(pairs), [0] * len(pairs)), *answers]

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`."""
        known = dict(zip(symbols[: 2 * self.pairs : 2], symbols[1 : 2 * self.pairs : 2], strict=True))
        asked = [place > 0 and symbols[place - 1] == ASK for place in range(len(symbols))]
        return [known[symbol] if here else None for symbol, here in zip(symbols, asked, strict=True)]

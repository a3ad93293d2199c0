"""Addition with carry chains: the digits of a sum, the highest one first.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import FILL, Item, Task, TaskSamples, at_least, check_context, share


class Addition(Task):
    """Predicts the digits of a + b, from the highest to the lowest, for numbers of d digits.

    A digit of the sum depends on a carry from below. Where the digits of a and b add up to 9, a carry passes through, so the
    sum of digits further down decides. The difficulty of a digit is the length of that chain: 1 plus the number of adjacent
    lower places whose digits add up to 9. Random numbers have short chains; `propagate` makes them longer.

    Source: addition with carries, as in "Teaching arithmetic to small transformers", arXiv 2307.03381.
    When not to use it: to measure serial computation alone; a carry look-ahead circuit of logarithmic depth adds, too.

    Args:
        digits: d, from 1 to 32.
        propagate: the probability that the digits at a place are chosen to add up to 9.

    Example:
        >>> Addition(digits=3).solve(list("0 4 7 + 0 5 5 = 0 1 0 2".split()))[7:]
        ['0', '1', '0', '2', None]
    """

    paper: ClassVar[str] = "multi-digit addition, arXiv 2307.03381"
    examples: ClassVar[dict[str, str]] = {
        "chains": "Addition(digits=6, propagate=0.5)",
        "single": "Addition(digits=1, propagate=0.0)",
    }

    def __init__(self, digits: int = 6, propagate: float = 0.5) -> None:
        self.digits, self.propagate = at_least("digits", digits, 1, 32), share("propagate", propagate)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The digits, then + and =."""
        return (*map(str, range(10)), "+", "=")

    @property
    def answers(self) -> int:
        """The number of digits."""
        return 10

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`. The sum has one digit more than the numbers; it is read back in as in decoding."""
        needed = 3 * self.digits + 3
        check_context(self, context, needed)
        return self.packed(([self._problem(rng) for _ in range(context // needed)] for _ in range(count)), context)

    def _problem(self, rng: np.random.Generator) -> Item:
        a_d, b_d = rng.integers(10, size=(2, self.digits))  # the highest digit first
        b_d = np.where(rng.random(self.digits) < self.propagate, 9 - a_d, b_d)
        total = int("".join(map(str, a_d))) + int("".join(map(str, b_d)))
        answer = list(str(total).zfill(self.digits + 1))
        chain = [self._chain(a_d + b_d, place) for place in range(self.digits + 1)]
        question = [*map(str, a_d), "+", *map(str, b_d), "="]
        silent = len(question) - 1
        # The last digit is read, too, so that every problem has the same length, but predicts nothing.
        return Item(question + answer, [None] * silent + answer + [None], [0] * silent + chain + [0])

    def _chain(self, sum_d: np.ndarray, place: int) -> int:
        """The serial steps of a digit of the sum; place 0 is the digit above the highest ones."""
        below, steps = place, 1
        while below < self.digits and sum_d[below] == 9:
            below, steps = below + 1, steps + 1
        return steps

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`. Adds Python integers."""
        answers: list[str | None] = [None] * len(symbols)
        start = 0
        while start + 3 * self.digits + 3 <= len(symbols) and symbols[start] != FILL:
            text = "".join(symbols[start : start + 2 * self.digits + 1])
            total = str(sum(map(int, text.split("+")))).zfill(self.digits + 1)
            equals = start + 2 * self.digits + 1
            answers[equals : equals + self.digits + 1] = list(total)
            start += 3 * self.digits + 3
        return answers

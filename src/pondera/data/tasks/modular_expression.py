"""Modular expressions: the value of a nested sum or product modulo m.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import Item, Task, TaskSamples, at_least, check_context


class ModularExpression(Task):
    """Evaluates nested expressions such as ``( 3 * ( 2 + 5 ) ) =`` modulo m and predicts the value after ``=``.

    The numbers are 0 to m - 1, the operations +, - and *. An expression of depth d has an operation whose arguments have
    depth at most d - 1, one of them exactly, so d operations follow from one another. The difficulty of the answer is d.

    Source: arithmetic over finite fields as in "Towards revealing the mystery behind chain of thought", arXiv 2305.15408.
    When not to use it: with a large modulus that is not prime, where many products are 0.

    Args:
        modulus: m, from 2 to 64.
        depth: the largest d, from 1 to 8. Each d is equally frequent.
        branch: the probability that the second argument is an expression, too.

    Example:
        >>> ModularExpression(modulus=7).solve("( 3 * ( 2 + 5 ) ) =".split())[-1]
        '0'
    """

    paper: ClassVar[str] = "modular arithmetic, arXiv 2305.15408"
    examples: ClassVar[dict[str, str]] = {
        "deep": "ModularExpression(modulus=7, depth=4)",
        "flat": "ModularExpression(modulus=5, depth=1, branch=0.0)",
    }

    def __init__(self, modulus: int = 7, depth: int = 4, branch: float = 0.25) -> None:
        self.modulus, self.depth = at_least("modulus", modulus, 2, 64), at_least("depth", depth, 1, 8)
        self.branch = branch

    @property
    def symbols(self) -> tuple[str, ...]:
        """The numbers, then the operations, brackets and the equals sign."""
        return (*map(str, range(self.modulus)), "+", "-", "*", "(", ")", "=")

    @property
    def answers(self) -> int:
        """The modulus."""
        return self.modulus

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`. Expressions that do not fit into the rest of a window are drawn again, then left out."""
        check_context(self, context, 4 * self.depth + 2)
        return self.packed((list(self._window(rng, context)) for _ in range(count)), context)

    def _window(self, rng: np.random.Generator, context: int) -> Iterator[Item]:
        room, fails = context, 0
        while fails < 4:
            depth = 1 + int(rng.integers(self.depth))
            symbols, value = self._expression(rng, depth)
            if len(symbols) + 1 > room:
                fails += 1
                continue
            room -= len(symbols) + 1
            silent = len(symbols)
            yield Item([*symbols, "="], [None] * silent + [str(value)], [0] * silent + [depth])

    def _expression(self, rng: np.random.Generator, depth: int) -> tuple[list[str], int]:
        if depth == 0:
            value = int(rng.integers(self.modulus))
            return [str(value)], value
        other = int(rng.integers(depth)) if rng.random() < self.branch else 0
        parts = [self._expression(rng, depth - 1), self._expression(rng, other)]
        if rng.random() < 0.5:
            parts.reverse()
        operation = "+-*"[int(rng.integers(3))]
        (first, a), (second, b) = parts
        value = {"+": a + b, "-": a - b, "*": a * b}[operation] % self.modulus
        return ["(", *first, operation, *second, ")"], value

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`. A stack of values and operations, read from left to right."""
        stack: list[str | int] = []
        answers: list[str | None] = [None] * len(symbols)
        for place, symbol in enumerate(symbols):
            if symbol == "=":
                answers[place] = str(stack.pop())
            elif symbol == ")":
                right, operation, left, _ = (stack.pop() for _ in range(4))
                assert isinstance(left, int) and isinstance(right, int)
                results = {"+": left + right, "-": left - right, "*": left * right}
                stack.append(results[str(operation)] % self.modulus)
            else:
                stack.append(int(symbol) if symbol.isdigit() else symbol)
        return answers

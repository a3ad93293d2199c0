"""Pointer chasing: where a chain of k links from a node ends.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import FILL, Item, Task, TaskSamples, at_least, check_context


class PointerChasing(Task):
    """Follows k links of a random map and predicts the node where they end.

    A window lists a map of n nodes as pairs in random order (node, next node), then asks: a start node, and ``>k``, where
    the node k links further must be predicted. The map is new in every window, and the next nodes are a permutation, so
    each node is equally often an answer. The difficulty is k.

    Source: k-hop look-ups, as in "Transformers, parallel computation, and logarithmic depth", arXiv 2402.09268. Each
    layer can double the length of the chains that it knows, so L layers follow about 2^L links.
    When not to use it: with few nodes and many hops, where chains run in short circles.

    Args:
        nodes: n, from 2 to 64.
        hops: the largest k, from 1 to 16.

    Example:
        >>> PointerChasing(nodes=3, hops=2).solve(["n0", "n2", "n1", "n0", "n2", "n1", "n1", ">2"])
        [None, None, None, None, None, None, None, 'n2']
    """

    paper: ClassVar[str] = "k-hop look-ups, arXiv 2402.09268"
    examples: ClassVar[dict[str, str]] = {"hops": "PointerChasing(nodes=6, hops=4)", "one": "PointerChasing(4, hops=1)"}

    def __init__(self, nodes: int = 8, hops: int = 4) -> None:
        self.nodes, self.hops = at_least("nodes", nodes, 2, 64), at_least("hops", hops, 1, 16)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The nodes, then the numbers of hops."""
        return (*self._nodes, *(f">{hops}" for hops in range(1, self.hops + 1)))

    @property
    def _nodes(self) -> list[str]:
        return [f"n{node}" for node in range(self.nodes)]

    @property
    def answers(self) -> int:
        """The number of nodes."""
        return self.nodes

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`. Questions fill the window after the map."""
        check_context(self, context, 2 * self.nodes + 2)
        questions = (context - 2 * self.nodes) // 2
        return self.packed((self._window(rng, questions) for _ in range(count)), context)

    def _window(self, rng: np.random.Generator, questions: int) -> list[Item]:
        names, follows = self._nodes, rng.permutation(self.nodes)
        pairs = [name for node in rng.permutation(self.nodes) for name in (names[node], names[follows[node]])]
        items = [Item(pairs, [None] * len(pairs), [0] * len(pairs))]
        for start, hops in zip(
            rng.integers(self.nodes, size=questions), 1 + rng.integers(self.hops, size=questions), strict=True
        ):
            end = start
            for _ in range(hops):
                end = follows[end]
            items.append(Item([names[start], f">{hops}"], [None, names[end]], [0, hops]))
        return items

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`. Reads the pairs into a dictionary and follows the links."""
        pairs = symbols[: 2 * self.nodes]
        follows = dict(zip(pairs[::2], pairs[1::2], strict=True))
        answers: list[str | None] = [None] * len(symbols)
        for place, symbol in enumerate(symbols):
            if symbol.startswith(">") and symbol != FILL:
                node = symbols[place - 1]
                for _ in range(int(symbol[1:])):
                    node = follows[node]
                answers[place] = node
        return answers

"""State tracking: after each token, the product of all group elements since the last reset.

Shapes: N windows, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pondera.data.tasks.base import FILL, Task, TaskSamples, share
from pondera.data.tasks.common.groups import after, generators, group

RESET = "R"


class StateTracking(Task):
    """Predicts, after each group element, the product of the elements since the last reset.

    Every token is an element of a finite group or a reset, which sets the state to the identity. The model must output the
    state after each token. The difficulty of a token is the number of elements since the last reset, so 0 for a reset. A
    model with a fixed number of layers and one pass per token cannot track a group such as S5 over any length; a state
    that is carried from token to token can.

    Source: the word problem of finite groups, as in "The Illusion of State in State-Space Models", arXiv 2404.08819, with
    resets added here.
    When not to use it: with ``group="Z2"`` (``"parity"``) or another commutative group to separate serial from parallel
    computation, because sums can be computed in parallel.

    Args:
        group: ``"S3"``, ``"S4"``, ``"S5"``, ``"A4"``, ``"A5"``, ``"Z60"`` (any ``Zn``) or ``"parity"``.
        reset: the probability that a token is a reset.
        generators: draw a few elements only, whose products are the whole group. The products to be learned are then few,
            also in a large group such as ``"A5"``.

    Example:
        >>> task = StateTracking("Z60", reset=0.5)
        >>> task.solve(["7", "20", "R", "59", "2"])
        ['7', '27', '0', '59', '1']
    """

    paper: ClassVar[str] = "word problem of finite groups, arXiv 2404.08819"
    examples: ClassVar[dict[str, str]] = {
        "resets": "StateTracking(group='S3', reset=0.25)",
        "no-resets": "StateTracking(group='A5', reset=0.0)",
        "parity": "StateTracking(group='parity', reset=0.1)",
        "generators": "StateTracking(group='A5', reset=0.2, generators=True)",
    }

    def __init__(self, group: str = "S3", reset: float = 0.25, generators: bool = False) -> None:
        self.group, self.reset = _group(group), share("reset", reset)
        self.drawn = np.array(_generators(self.group) if generators else range(self.answers))

    @property
    def symbols(self) -> tuple[str, ...]:
        """The elements, then the reset."""
        return (*self.group.names, RESET)

    @property
    def answers(self) -> int:
        """The number of elements of the group."""
        return len(self.group.elements)

    def sample(self, rng: np.random.Generator, count: int, context: int) -> TaskSamples:
        """See `Task.sample`."""
        element_NC = self.drawn[rng.integers(len(self.drawn), size=(count, context))]
        reset_NC = rng.random((count, context)) < self.reset
        state_NC, since_NC = np.empty_like(element_NC), np.empty_like(element_NC)
        state_N, since_N = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for place in range(context):
            reset_N = reset_NC[:, place]
            state_N = np.where(reset_N, 0, self.group.product[state_N, element_NC[:, place]])
            since_N = np.where(reset_N, 0, since_N + 1)
            state_NC[:, place], since_NC[:, place] = state_N, since_N
        return TaskSamples(1 + np.where(reset_NC, self.answers, element_NC), 1 + state_NC, since_NC)

    def solve(self, symbols: Sequence[str]) -> list[str | None]:
        """See `Task.solve`. Composes permutations one by one."""
        element = dict(zip(self.group.names, self.group.elements, strict=True))
        name = {value: key for key, value in element.items()}
        state, states = self.group.elements[0], []
        for symbol in symbols:
            if symbol == FILL:
                states.append(None)
                continue
            state = self.group.elements[0] if symbol == RESET else after(state, element[symbol])
            states.append(name[state])
        return states


_group, _generators = group, generators

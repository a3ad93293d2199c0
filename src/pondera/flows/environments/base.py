"""Base class of environments: objects that are built step by step, as operations on integer tensors.

A state is a row of integers. An action is a number; at a state, a mask says which actions are possible, and another one which
actions can have led there. No two actions join the same two states. Finished states have no actions.

Shapes: B states, C columns of a state, A actions, K entries of a distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.core.spec_repr import SpecRepr


class RewardTable(NamedTuple):
    """How often each log reward occurs among all objects.

    Args:
        log_R_K: log rewards, float64.
        count_K: number of objects with that reward, float64.
        mode_K: whether these objects are modes.
    """

    log_R_K: Tensor
    count_K: Tensor
    mode_K: Tensor


class Environment(SpecRepr, ABC):
    """A directed acyclic graph of states, given by its actions, with a reward of the finished ones.

    A subclass sets `radices`, `actions`, `graded` and `longest` in its constructor.
    """

    radices: Sequence[int]
    """Number of values of each column of a state."""
    actions: int
    """Number of actions, possible or not."""
    graded: bool
    """Whether all trajectories have the same number of steps."""
    longest: int
    """Steps of the longest trajectory."""
    why_graded: ClassVar[str] = ""

    def start(self, count: int) -> Tensor:
        """The first state, `count` times: ``[B, C]``."""
        return torch.zeros(count, len(self.radices), dtype=torch.long)

    @abstractmethod
    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Which actions are possible, ``[B, A]``."""

    @abstractmethod
    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """Which actions can have led to the state, ``[B, A]``."""

    @abstractmethod
    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """The states after an action."""

    @abstractmethod
    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """The states before an action that led here."""

    @abstractmethod
    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether a state is a finished object, ``[B]``."""

    @abstractmethod
    def log_partial(self, state_BC: Tensor) -> Tensor:
        """Log reward of states, finished or not, ``[B]``, float64; −inf is a reward of 0."""

    @abstractmethod
    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether a finished object is a mode, ``[B]``."""

    @abstractmethod
    def remaining(self, state_BC: Tensor) -> Tensor:
        """The most steps to a finished object, ``[B]``; exact if the environment is graded."""

    @abstractmethod
    def count_states(self) -> int:
        """Number of states."""

    @abstractmethod
    def count_modes(self) -> int | None:
        """Number of modes; `None`: it cannot be counted."""

    @abstractmethod
    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random finished objects, to test a sampler of an environment that is too large to be counted."""

    def features(self, state_BC: Tensor) -> Tensor:
        """The input of a network: one-hot columns, ``[B, sum of radices]``, float32."""
        offsets = torch.tensor([0, *self.radices[:-1]]).cumsum(0)
        found = torch.zeros(len(state_BC), sum(self.radices))
        return found.scatter_(1, state_BC + offsets, 1.0)

    @property
    def width(self) -> int:
        """Width of `features`."""
        return sum(self.radices)

    def key(self, state_BC: Tensor) -> Tensor:
        """A different integer for each state, ``[B]``.

        Raises:
            UserError: there are too many states.
        """
        if math.log2(max(2, math.prod(self.radices))) >= 63:
            raise UserError(f"{self!r} has too many states to number them")
        place = torch.tensor([math.prod(self.radices[index + 1 :]) for index in range(len(self.radices))])
        return (state_BC * place).sum(-1)

    def reward_table(self) -> RewardTable | None:
        """The distribution of rewards, if it is known without listing the states; default: `None`."""
        return None


def whole(name: str, value: int, least: int, most: int) -> int:
    """A setting in its range.

    Raises:
        UserError: it is not an integer in the range.
    """
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name}={value!r}: give a whole number from {least} to {most}")
    return value

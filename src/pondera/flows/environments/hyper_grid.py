"""The hyper-grid. Shapes: B states, D dimensions, C = D + 1 columns (the last: stopped)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment, whole


class HyperGrid(Environment):
    """Walks from a corner of a grid, one step at a time, and stops anywhere; the reward has a mode near each corner.

    R = base + 0.5 · [all |x − ½| > ¼] + 2 · [all 0.3 < |x − ½| < 0.4], with coordinates x from 0 to 1. Trajectories have
    different lengths, so the environment is not graded. Stopping is an action.

    Source: Bengio et al., arXiv 2106.04399, section 4.1.
    Resolved: modes are the points with the highest of the three terms.

    Args:
        dims: number of dimensions.
        side: points per dimension.
        base: the reward of points far from all modes.

    Example:
        >>> env = HyperGrid(2, side=8)
        >>> env.count_modes(), env.longest
        (4, 15)
    """

    paper: ClassVar[str] = "hyper-grid, arXiv 2106.04399"
    examples: ClassVar[dict[str, str]] = {"small": "HyperGrid(2, side=4)"}
    why_graded: ClassVar[str] = "a walk can stop anywhere"

    def __init__(self, dims: int = 4, side: int = 8, base: float = 0.01) -> None:
        self.dims, self.side = whole("dims", dims, 1, 100), whole("side", side, 2, 1000)
        if not 0 < base < 1e6:
            raise UserError(f"base={base}: give a reward above 0; points without reward have no logarithm")
        self.base = base
        self.radices, self.actions = (*(side,) * dims, 2), dims + 1
        self.graded, self.longest = False, dims * (side - 1) + 1

    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Dimensions that are not at their end, and stopping, unless stopped."""
        up = torch.nn.functional.pad(state_BC[:, :-1] < self.side - 1, (0, 1), value=True)
        return up & (state_BC[:, -1:] == 0)

    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """Stopping if stopped; otherwise the dimensions that are not at their beginning."""
        stopped = state_BC[:, -1:] == 1
        return torch.cat([(state_BC[:, :-1] > 0) & ~stopped, stopped], 1)

    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """One step up, or stop."""
        return state_BC + torch.nn.functional.one_hot(action_B, self.dims + 1)

    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """One step down, or not stopped."""
        return state_BC - torch.nn.functional.one_hot(action_B, self.dims + 1)

    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether the walk has stopped."""
        return state_BC[:, -1] == 1

    def log_partial(self, state_BC: Tensor) -> Tensor:
        """Log reward of the point, stopped or not."""
        far, ring = self._terms(state_BC)
        return (self.base + 0.5 * far.double() + 2.0 * ring.double()).log()

    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether the point has the highest term."""
        return self._terms(state_BC)[1]

    def remaining(self, state_BC: Tensor) -> Tensor:
        """Steps to the far corner, and the stop."""
        return ((self.side - 1 - state_BC[:, :-1]).sum(1) + 1) * (1 - state_BC[:, -1])

    def count_states(self) -> int:
        """Points, stopped or not."""
        return 2 * self.side**self.dims

    def count_modes(self) -> int | None:
        """Points of the ring in every dimension."""
        line = torch.arange(self.side)[:, None]
        return int(self._terms(torch.cat([line, line], 1))[1].sum()) ** self.dims

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points, stopped."""
        point = torch.randint(self.side, (count, self.dims), generator=generator)
        return torch.nn.functional.pad(point, (0, 1), value=1)

    def _terms(self, state_BC: Tensor) -> tuple[Tensor, Tensor]:
        # Distances in whole numbers: |2x − (side − 1)| / (2 (side − 1)), so that 0.3 and 0.4 are met exactly or not at all.
        off = (2 * state_BC[:, :-1] - (self.side - 1)).abs()
        full = 2 * (self.side - 1)
        return (4 * off > full).all(1), ((10 * off > 3 * full) & (10 * off < 4 * full)).all(1)

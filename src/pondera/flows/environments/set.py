"""Sets of a given size. Shapes: B states, N items, A = N actions, K reward values."""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment, RewardTable, whole

PUBLISHED: dict[str, tuple[int, int, float, tuple[float, ...]]] = {
    "small": (30, 20, 0.25, (0.6961474461702144, 0.883494921538938, -0.2745059751263419, 0.7442282139370466,
        -0.40046449111789073, 0.6261749162235306, -0.4381397850674522, 0.4110535720923896, 0.8206350287761408,
        0.013149744911117978)),
    "medium": (80, 60, 7e5, (-0.5230497555411129, 0.5731802451199923, 0.6881812517688572, -0.7866830411595669,
        -0.41860806745880197, 0.7396350970666805, 0.6009291618806774, -0.7837872949891345, -0.3855205729595568,
        0.2961218224370139)),
    "large": (100, 80, 7e5, (-0.15382957507887518, -0.8596854107736154, 0.13832182722858843, -0.4589997720511263,
        0.9244538380742333, -0.5938789622812419, 0.7326989860019331, 0.3925029176153736, 0.7231982581431591,
        -0.5596177369051512)),
}  # fmt: skip
"""Items, chosen items, reward of a mode, and the ten energies; each belongs to a tenth of the items."""
TOP = 0.005
"""Share of the sets that are modes if energies are drawn."""
MOST_VALUES = 2**21
"""Sums of energies that are kept apart; more are binned."""
BIN, MOST_CELLS = 2.5e-4, 2**26
"""Width of a bin, and cells of the table of counts by size and bin; bins are wider where it would have more."""
MOST_COUNTED = 200_000


class Set(Environment):
    """Chooses items one by one until the set has its size; the reward is the product of the rewards exp(−energy) of its items.

    All trajectories have one length, so the environment is graded. Rewards are counted without listing the sets: items of equal
    energy are interchangeable.

    Source: the set generation task of Pan et al., arXiv 2302.01687, with the energies of arXiv 2602.01749 (``small``,
        ``medium``, ``large``: energies published with the code of that paper; items of equal energy are adjacent here).
    Resolved: other sets have energies uniform in (−1, 1), drawn from `seed`, and their modes are the best 0.5 % of the sets.

    Args:
        size: number of items.
        choose: number of chosen items.
        energies: ``small`` (30, 20), ``medium`` (80, 60) or ``large`` (100, 80), or a list of one number per item;
            default: `None`, drawn.
        seed: of drawn energies.
        threshold: reward above which a set is a mode; default: `None`, the published one, or the best 0.5 %.

    Example:
        >>> env = Set(4, choose=2, energies=[0.0, 0.0, 0.0, -1.0])
        >>> env.forward_mask(env.step(env.start(1), torch.tensor([3]))).tolist()
        [[True, True, True, False]]
    """

    paper: ClassVar[str] = "set generation, arXiv 2302.01687; energies: arXiv 2602.01749"
    examples: ClassVar[dict[str, str]] = {"small": "Set(5, choose=3)"}
    why_graded: ClassVar[str] = "every set takes one step per chosen item"

    def __init__(
        self,
        size: int = 16,
        choose: int = 8,
        energies: str | list | tuple | None = None,
        seed: int = 0,
        threshold: float | None = None,
    ) -> None:
        self.size = whole("size", size, 1, 1000)
        self.choose = whole("choose", choose, 1, size)
        self.energy_N, known = _energies(size, choose, energies, seed)
        self.radices, self.actions, self.graded, self.longest = (2,) * size, size, True, choose
        if threshold is None:
            log_threshold = math.log(known) if known else self._best()
        elif threshold > 0:
            log_threshold = math.log(threshold)
        else:
            raise UserError(f"threshold={threshold}: give a reward above 0, above which a set is a mode")
        self.log_threshold = log_threshold

    def forward_mask(self, state_BC: Tensor) -> Tensor:
        """Items that are not chosen, while the set is not full."""
        return (state_BC == 0) & (state_BC.sum(1, keepdim=True) < self.choose)

    def backward_mask(self, state_BC: Tensor) -> Tensor:
        """Chosen items."""
        return state_BC == 1

    def step(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Adds an item."""
        return state_BC.scatter(1, action_B[:, None], 1)

    def undo(self, state_BC: Tensor, action_B: Tensor) -> Tensor:
        """Removes an item."""
        return state_BC.scatter(1, action_B[:, None], 0)

    def finished(self, state_BC: Tensor) -> Tensor:
        """Whether the set has its size."""
        return state_BC.sum(1) == self.choose

    def log_partial(self, state_BC: Tensor) -> Tensor:
        """Minus the sum of energies."""
        return -(state_BC.double() @ self.energy_N)

    def is_mode(self, state_BC: Tensor) -> Tensor:
        """Whether the reward is above the threshold."""
        return self.log_partial(state_BC) > self.log_threshold

    def remaining(self, state_BC: Tensor) -> Tensor:
        """Items to be chosen."""
        return self.choose - state_BC.sum(1)

    def count_states(self) -> int:
        """Sets of at most `choose` items."""
        return sum(math.comb(self.size, chosen) for chosen in range(self.choose + 1))

    def count_modes(self) -> int:
        """Modes, from the table of rewards."""
        table = self.reward_table()
        return round(float(table.count_K[table.mode_K].sum()))

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """Random sets."""
        chosen = torch.rand(count, self.size, generator=generator).argsort(1)[:, : self.choose]
        return self.start(count).scatter_(1, chosen, 1)

    def features(self, state_BC: Tensor) -> Tensor:
        """A 1 for each chosen item."""
        return state_BC.float()

    @property
    def width(self) -> int:
        """Width of `features`."""
        return self.size

    def reward_table(self) -> RewardTable:
        """Rewards and their numbers of sets, by convolution over groups of equal energy.

        Up to 2 million sums of energies are kept apart; more are counted in narrow bins.
        """
        log_R, ways = self._counted
        return RewardTable(
            torch.from_numpy(log_R), torch.from_numpy(ways), torch.from_numpy(log_R > self.log_threshold)
        )

    @cached_property
    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        return _counted(self.energy_N.numpy(), self.choose)

    def _best(self) -> float:
        """A log reward between the best 0.5 % of the sets and the others."""
        order = np.argsort(-self._counted[0], kind="stable")
        log_R, ways = self._counted[0][order], self._counted[1][order].cumsum()
        last = int(np.searchsorted(ways, math.ceil(TOP * ways[-1]) - 0.5))
        return float(log_R[last] + log_R[last + 1]) / 2 if last + 1 < len(log_R) else float(log_R[last]) - 1.0


def _energies(size: int, choose: int, given: str | list | tuple | None, seed: int) -> tuple[Tensor, float | None]:
    """The energy of each item, and the published reward of a mode."""
    if isinstance(given, str):
        if given not in PUBLISHED:
            raise UserError(f"energies={given!r}: give small, medium, large, or a list of {size} numbers")
        items, chosen, threshold, values = PUBLISHED[given]
        if (size, choose) != (items, chosen):
            raise UserError(
                f"energies={given!r} belong to Set({items}, choose={chosen}), not to Set({size}, choose={choose})"
            )
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(items // len(values)), threshold
    if given is None:
        drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return 2 * drawn - 1, None
    energy_N = torch.tensor(given, dtype=torch.float64)
    if energy_N.shape != (size,) or not torch.isfinite(energy_N).all():
        raise UserError(f"energies: give {size} finite numbers, one per item, got {given!r:.60}")
    return energy_N, None


def _counted(energy_N: np.ndarray, choose: int) -> tuple[np.ndarray, np.ndarray]:
    """Log rewards of full sets and their numbers of sets."""
    values, sizes = np.unique(energy_N, return_counts=True)
    few = math.prod(int(size) + 1 for size in sizes) <= MOST_VALUES or math.comb(len(energy_N), choose) <= MOST_COUNTED
    groups = [
        (float(value), [math.comb(size, take) for take in range(size + 1)])
        for value, size in zip(values, sizes.tolist(), strict=True)
    ]
    return _exact(groups, choose) if few else _binned(groups, choose)


Groups = list[tuple[float, list[int]]]
"""The energy of a group of items, and in how many ways 0, 1, ... of them can be chosen."""


def _exact(groups: Groups, choose: int) -> tuple[np.ndarray, np.ndarray]:
    """Every distinct sum of energies."""
    chosen, total, ways = np.zeros(1, np.int64), np.zeros(1), np.ones(1)
    for value, counts in groups:
        take = np.arange(len(counts))
        chosen = (chosen[:, None] + take).ravel()
        fits = chosen <= choose
        total = (total[:, None] + take * value).ravel()[fits]
        ways = (ways[:, None] * counts).ravel()[fits]
        chosen = chosen[fits]
        key = np.stack([chosen, np.rint(total * 1e9).astype(np.int64)])
        _, first, inverse = np.unique(key, axis=1, return_index=True, return_inverse=True)
        chosen, total, ways = chosen[first], total[first], np.bincount(inverse.ravel(), ways)
    full = chosen == choose
    return -total[full], ways[full]


def _binned(groups: Groups, choose: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of energies in bins, by convolution of groups; a sum is off by half a bin per group at most."""
    low = sum(min(0.0, value) * (len(counts) - 1) for value, counts in groups)
    high = sum(max(0.0, value) * (len(counts) - 1) for value, counts in groups)
    width = max(BIN, (high - low) * (choose + 1) / MOST_CELLS)
    origin, edge = math.floor(low / width) - len(groups), math.ceil(high / width) + len(groups)
    ways = np.zeros((choose + 1, edge - origin + 1))
    ways[0, -origin] = 1.0
    for value, counts in groups:
        after = np.zeros_like(ways)
        for take, count in enumerate(counts[: choose + 1]):
            shift = round(take * value / width)
            source, place = (
                slice(max(0, -shift), ways.shape[1] - max(0, shift)),
                slice(max(0, shift), ways.shape[1] + min(0, shift)),
            )
            after[take:, place] += count * ways[: choose + 1 - take, source]
        ways = after
    there = ways[choose].nonzero()[0]
    return -(there + origin) * width, ways[choose][there]

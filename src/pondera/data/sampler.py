"""StepSampler: the windows of each forward pass in training, and their collation into batches.

Shapes: B batch, C context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from pondera.core.mixed_seed import mixed_seed


class StepSampler(Sampler[list[int]]):
    """Samples the windows of every optimizer step: a new permutation per epoch, determined by the seed.

    The order is independent of the global random state and of the number of processes. So each step has the same windows
    if training is resumed, split into micro-batches or distributed over processes.

    Args:
        num_windows: number of windows in the split.
        batch_size: windows per optimizer step, over all processes.
        micro_batch_size: windows per forward pass of one process; the last pass of a step may have fewer.
        steps: optimizer steps in total.
        seed: seed of the permutations.
        first_step: number of completed steps.
        rank: rank of this process.
        num_processes: number of processes, which take equal shares of a step.

    Example:
        >>> order = StepSampler(num_windows=10, batch_size=4, micro_batch_size=2, steps=5, seed=0)
        >>> len(order), sorted(order.windows_of(0) + order.windows_of(1) + order.windows_of(2)[:2])
        (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        micro_batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_windows, self.batch_size, self.micro_batch_size = num_windows, batch_size, micro_batch_size
        self.steps, self.seed, self.first_step = steps, seed, first_step
        self.share = batch_size // num_processes
        self.rank = rank
        self._permutation = lru_cache(maxsize=2)(self._permute)  # a step can span two epochs

    def windows_of(self, step: int) -> list[int]:
        """The windows of one step, over all processes."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._permutation(place // self.num_windows)[place % self.num_windows]) for place in places]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            mine = self.windows_of(step)[self.rank * self.share : (self.rank + 1) * self.share]
            for start in range(0, self.share, self.micro_batch_size):
                yield mine[start : start + self.micro_batch_size]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * math.ceil(self.share / self.micro_batch_size)

    def _permute(self, epoch: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.num_windows, generator=generator, device="cpu")


ARGUMENTS = {"input_ids": "input_ids", "targets": "shift_labels", "document_ids": "document_ids", "passes": "passes"}


def collate(windows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collates windows into keyword arguments of the model: ``input_ids``, ``shift_labels``, with a document mask
    ``document_ids``, and with known difficulty ``passes``, each ``[B, C]``."""
    names = [name for name in ARGUMENTS if name in windows[0]]
    return {ARGUMENTS[name]: torch.stack([window[name] for window in windows]) for name in names}

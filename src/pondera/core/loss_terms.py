"""Loss terms as sums and counts, so that the loss does not depend on how a batch is split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossTerm:
    """One loss term: a sum and the number of its elements.

    A mean per micro-batch would give short and long micro-batches equal weight and grow with gradient accumulation. With a
    sum and a count the trainer divides once, by the count of the whole step.

    Args:
        sum: the sum, a scalar with gradient.
        count: number of elements in the sum.
        weight: weight of the mean in the loss.

    Example:
        >>> LossTerm(torch.tensor(6.0), 3).mean()
        tensor(2.)
    """

    sum: Tensor
    count: Tensor | float
    weight: float = 1.0

    def mean(self) -> Tensor:
        """The unweighted mean; 0 if the count is 0."""
        count = torch.as_tensor(self.count)
        return self.sum / torch.where(count == 0, torch.ones_like(count), count)

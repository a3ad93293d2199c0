"""Loss terms as sums and counts, so that how a batch is split changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossTerm:
    """One loss term: a sum and what it was summed over.

    A mean per micro-batch would weigh short and long micro-batches alike and grow with gradient accumulation; a sum and
    a count let the trainer divide once, by the count of the whole step.

    Args:
        sum: the summed term, a scalar that carries gradient.
        count: how many things were summed.
        weight: its weight in the loss.

    Example:
        >>> LossTerm(torch.tensor(6.0), 3).mean()
        tensor(2.)
    """

    sum: Tensor
    count: Tensor | float
    weight: float = 1.0

    def mean(self) -> Tensor:
        """The unweighted mean; 0 where nothing was counted, as the sum is."""
        count = torch.as_tensor(self.count)
        return self.sum / torch.where(count == 0, torch.ones_like(count), count)

"""Count, mean and covariance of vectors that arrive in parts.

Shapes: B batch, T vectors, D their width; ``...`` further dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Statistics of vectors.

    Args:
        count_B: number of vectors.
        mean: ``[B, ..., D]``.
        products: ``[B, ..., D, D]``: the sum of the products of differences to the mean.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> there = torch.ones(1, 3, dtype=torch.bool)
        >>> parts = [Moments.of(x[:, part], there[:, part]) for part in (slice(2), slice(2, 3))]
        >>> [moments.covariance().item() for moments in (Moments.of(x, there), parts[0].joined(parts[1]))]
        [8.666666984558105, 8.666666984558105]
    """

    count_B: Tensor
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor, there_BT: Tensor) -> Moments:
        """The statistics of vectors ``[B, ..., T, D]``; those where `there_BT` is false do not count."""
        there = there_BT.view(len(x), *[1] * (x.ndim - 3), -1, 1).to(x.dtype)
        count_B = there_BT.sum(-1)
        mean = (x * there).sum(-2) / _wide(count_B.clamp(min=1), x.ndim - 1)
        apart = (x - mean[..., None, :]) * there
        return cls(count_B, mean, apart.mT @ apart)

    def joined(self, other: Moments) -> Moments:
        """The statistics of the vectors of both."""
        count_B = self.count_B + other.count_B
        share = _wide(other.count_B / count_B.clamp(min=1), self.mean.ndim)
        step = other.mean - self.mean
        between = step[..., None] * step[..., None, :] * (_wide(self.count_B, step.ndim) * share)[..., None]
        return Moments(count_B, self.mean + step * share, self.products + other.products + between)

    def covariance(self) -> Tensor:
        """``[B, ..., D, D]``."""
        return self.products / _wide(self.count_B.clamp(min=1), self.products.ndim)


def _wide(x_B: Tensor, ndim: int) -> Tensor:
    return x_B.view(-1, *[1] * (ndim - 1))

"""Collective operations over training processes. All processes must call them together.

Shapes: N vectors of one process (N may differ between processes), M vectors of all processes, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def num_ranks() -> int:
    """Number of training processes; 1 without distributed training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def summed(x: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place."""
    if num_ranks() > 1:
        distributed.all_reduce(x)
    return x


def gathered(x_NC: Tensor) -> Tensor:
    """Gathers the vectors of all processes in the order of their ranks, ``[M, C]``, without gradient."""
    x_NC = x_NC.detach()
    if num_ranks() == 1:
        return x_NC
    sizes = [torch.zeros(1, dtype=torch.long, device=x_NC.device) for _ in range(num_ranks())]
    distributed.all_gather(sizes, torch.tensor([len(x_NC)], device=x_NC.device))
    most = max(int(size) for size in sizes)
    padded = torch.cat([x_NC, x_NC.new_zeros(most - len(x_NC), x_NC.shape[1])])
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

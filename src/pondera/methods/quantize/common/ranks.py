"""What processes that train together share, so that each decides alike. All have to call together.

Shapes: N vectors of one process (their number may differ), M of all, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def num_ranks() -> int:
    """How many processes train together; 1 where there is only this one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if num_ranks() > 1:
        distributed.all_reduce(x)
    return x


def gathered(x_NC: Tensor) -> Tensor:
    """The vectors of all processes in the order of their ranks, ``[M, C]``, without gradient."""
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

"""Pooling of scores over neighboring slots of a sequence.

Shapes: B batch, G KV heads, S slots, k pooling width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.errors import UserError, unknown

POOLS = ("max", "mean")


def check_pool(kernel: int, pool: str) -> None:
    """Raises if the pooling method is unknown or the pooling width is not an odd number."""
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise UserError(f"kernel={kernel!r}: give an odd number of tokens, 1 or more")


def pooled(score: Tensor, position_BGS: Tensor, kernel: int, pool: str) -> Tensor:
    """The maximum or mean of the scores of each slot and its neighbors in the sequence.

    Neighbors are the nearest slots in the cache, even if the cache has evicted tokens between them. Scores beyond both
    ends are 0.

    Args:
        score: ``[B, G, S]`` or ``[B, G, R, S]``, 0 or more; 0 for empty slots.
        position_BGS: position of each slot in the sequence; see `KVStore`.
        kernel: pooling width in slots, an odd number.
        pool: ``"max"`` or ``"mean"``.

    Example:
        >>> score = torch.tensor([[[0.0, 3.0, 0.0, 0.0]]])
        >>> pooled(score, torch.tensor([[[2, 0, 3, 1]]]), 3, "max")  # 3.0 has position 0; its neighbor is the last slot
        tensor([[[0., 3., 0., 3.]]])
    """
    order_BGS = position_BGS.argsort(dim=-1)
    order = order_BGS if score.ndim == 3 else order_BGS[:, :, None].expand(score.shape)
    windows = F.pad(score.gather(-1, order), (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)
    result = windows.amax(-1) if pool == "max" else windows.mean(-1)
    return torch.zeros_like(score).scatter(-1, order, result)

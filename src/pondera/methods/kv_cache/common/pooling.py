"""Scores of slots smoothed over their neighbours in the text.

Shapes: B batch, G KV heads, S slots, k width of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.core.errors import UserError, unknown

POOLS = ("max", "mean")


def check_pool(kernel: int, pool: str) -> None:
    """Refuses a pool that there is not."""
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise UserError(f"kernel={kernel!r}: give an odd number of tokens, 1 or more")


def pooled(score: Tensor, position_BGS: Tensor, kernel: int, pool: str) -> Tensor:
    """Each slot's score and those of its neighbours in the text, as their largest or their mean.

    Neighbours are those that are kept, whatever was forgotten between them. Beyond both ends scores count as 0.

    Args:
        score: ``[B, G, S]`` or ``[B, G, R, S]``, 0 or more; 0 where a slot holds nothing.
        position_BGS: where in the text; see `KVStore`.
        kernel: slots that are pooled, an odd number.
        pool: ``"max"`` or ``"mean"``.

    Example:
        >>> score = torch.tensor([[[0.0, 3.0, 0.0, 0.0]]])
        >>> pooled(score, torch.tensor([[[2, 0, 3, 1]]]), 3, "max")  # 3.0 stands first in the text, before the last
        tensor([[[0., 3., 0., 3.]]])
    """
    order_BGS = position_BGS.argsort(dim=-1)
    order = order_BGS if score.ndim == 3 else order_BGS[:, :, None].expand(score.shape)
    text = F.pad(score.gather(-1, order), (kernel // 2, kernel // 2)).unfold(-1, kernel, 1)
    found = text.amax(-1) if pool == "max" else text.mean(-1)
    return torch.zeros_like(score).scatter(-1, order, found)

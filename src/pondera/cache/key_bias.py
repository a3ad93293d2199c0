"""Key bias as an additional coordinate of queries and keys, so that fused causal attention kernels can apply it.

A bias w of a key is one more coordinate of the key, and the same coordinate of every query is 1: with the softmax scale a,
``a [q, 1] . [k, w / a] = a q.k + w``. The coordinate follows after the rotary embedding, and zeros pad heads to a width
that kernels support. Fused kernels accept no mask that requires a gradient; therefore this form keeps the memory of training
linear in the length of a sequence.

Shapes: B batch, S rows, H heads, G key and value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.attention import Attention

MULTIPLE = 8
"""Fused kernels require a head width that is a multiple of this."""


def extra_coordinates(head_dim: int) -> int:
    """The number of coordinates that a head gains: one for the bias, and zeros up to the next width that kernels support.

    Example:
        >>> extra_coordinates(64), extra_coordinates(20)
        (8, 4)
    """
    return MULTIPLE - head_dim % MULTIPLE


@dataclass(frozen=True)
class LogWeight:
    """The backbone's own attention with a key bias; see `pondera.cache.attention.Server`.

    Source: the FlashAttention form of PonderLM-3, arXiv 2603.02023. Cost: queries, keys and values are wider by
    `extra_coordinates`, because fused kernels require the same width for all three.

    Args:
        log_weight_BS: the number that is added to the attention scores of each key.
    """

    log_weight_BS: Tensor

    def __call__(
        self,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with queries ``[B, H, S, d]``, keys and values ``[B, G, S, d]``, after rotary embedding."""
        width, zeros_of = query.shape[-1], value.shape[-1]
        scale = width**-0.5 if scaling is None else scaling
        zeros = extra_coordinates(width) - 1
        weight_BGS1 = (self.log_weight_BS / scale).to(key.dtype)[:, None, :, None].expand(*key.shape[:-1], 1)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, zeros))
        key = F.pad(torch.cat([key, weight_BGS1], dim=-1), (0, zeros))
        value = F.pad(value, (0, query.shape[-1] - zeros_of))
        out_BSHd, _ = base(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return out_BSHd[..., :zeros_of], None

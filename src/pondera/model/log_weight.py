"""Log-weights of keys, inside the dot product: nothing to add to the scores, so fused causal kernels still do the work.

What is added to all scores of a key is one more coordinate of the key, times 1: with the softmax scale a,
``a [q, 1] . [k, w / a] = a q.k + w``. It is appended after rotation, and zeros follow up to a width that kernels take.
A mask that carries gradient is refused by every fused kernel, so in training this is what keeps memory linear.

Shapes: B batch, S rows, H heads, G key and value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.model.hf import AttentionInterface, AttentionMaskInterface, sdpa_mask
from pondera.model.rows import attention

LOG_WEIGHT = "pondera_log_weight"
MULTIPLE = 8
"""Fused kernels take heads whose width this divides."""


def further_coordinates(head_dim: int) -> int:
    """How much wider heads become: by one coordinate, and zeros up to the next width that kernels take.

    Example:
        >>> further_coordinates(64), further_coordinates(20)
        (8, 4)
    """
    return MULTIPLE - head_dim % MULTIPLE


def log_weight_attention(
    module: nn.Module,
    query_BHSd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    attention_mask: Tensor | None,
    log_weight_BS: Tensor,
    inner: str,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The backbone's own attention, with a number added to all scores of each key.

    Source: the FlashAttention form of PonderLM-3, arXiv 2603.02023. Cost: heads wider by `further_coordinates`, values too,
    as fused kernels want one width for all three.

    Args:
        module: the attention layer.
        query_BHSd, key_BGSd, value_BGSd: after rotation.
        attention_mask: as the inner function takes it.
        log_weight_BS: what is added.
        inner: the name of the attention function that does the work.
        scaling: of the scores; none: one over the root of the width.
        **kwargs: handed on.
    """
    width = query_BHSd.shape[-1]
    scale = width**-0.5 if scaling is None else scaling
    zeros = further_coordinates(width) - 1
    weight_BGS1 = (log_weight_BS / scale).to(key_BGSd.dtype)[:, None, :, None].expand(*key_BGSd.shape[:-1], 1)
    query = F.pad(F.pad(query_BHSd, (0, 1), value=1.0), (0, zeros))
    key = F.pad(torch.cat([key_BGSd, weight_BGS1], dim=-1), (0, zeros))
    value = F.pad(value_BGSd, (0, zeros + 1))
    out_BSHd, _ = attention(module, inner)(module, query, key, value, attention_mask, scaling=scale, **kwargs)
    return out_BSHd[..., :width], None


AttentionInterface.register(LOG_WEIGHT, log_weight_attention)
AttentionMaskInterface.register(LOG_WEIGHT, sdpa_mask)

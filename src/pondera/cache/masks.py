"""Attention masks over KV slots and tokens, and the positions of tokens.

Shapes: B batch, T tokens, S queries of a call, K cached and new slots together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SlotMask:
    """An attention mask over KV slots, for calls that are not plain causal attention.

    Args:
        allowed_BSK: bool, true where a query may attend; the batch size may be 1.
        query_positions_BS: the position of each query's token.
        key_positions_BK: the position of each slot's token. With positions, the window of sliding-window layers counts
            tokens for any number of slots per token.
        log_weight_BK: key bias, added to the attention scores of each slot; default: `None`, nothing is added.
    """

    allowed_BSK: Tensor
    query_positions_BS: Tensor
    key_positions_BK: Tensor
    log_weight_BK: Tensor | None = None


def token_positions(tokens: int, mask: Tensor | None, seen: int, device: torch.device) -> Tensor:
    """Positions ``[B or 1, T]`` of new tokens, counted from the first token of their document.

    Args:
        tokens: T, the number of new tokens.
        mask: ``[B, seen + T]`` token mask (0 = padding, else the number of the document), or `None`.
        seen: the number of earlier tokens.

    Example:
        >>> token_positions(6, torch.tensor([[0, 1, 1, 1, 2, 2]]), 0, torch.device("cpu")).tolist()
        [[0, 0, 1, 2, 0, 1]]
    """
    if mask is None:
        return torch.arange(seen, seen + tokens, device=device)[None]
    mask_BK = mask.long()
    count_BK = (mask_BK > 0).cumsum(-1) - 1
    begins_BK = mask_BK.diff(prepend=torch.zeros_like(mask_BK[:, :1])) != 0
    start_BK = torch.where(begins_BK, count_BK, 0).cummax(-1).values
    return (count_BK - start_BK).clamp(min=0)[:, -tokens:]


def has_documents(mask: Tensor | None) -> bool:
    """Whether a token or slot mask contains more than one document."""
    return mask is not None and mask.dtype != torch.bool and bool((mask > 1).any())


def needed(mask: Tensor | None) -> Tensor | None:
    """The token mask, or `None` if all tokens belong to one document and none is padding."""
    return None if mask is None or bool((mask == 1).all()) else mask


def document_mask(mask_BS: Tensor) -> SlotMask:
    """A causal mask within each document."""
    order_1S = torch.arange(mask_BS.shape[1], device=mask_BS.device)[None]
    allowed_BSK = within_documents(mask_BS, mask_BS) & (order_1S[:, :, None] >= order_1S[:, None, :])
    return SlotMask(allowed_BSK, order_1S, order_1S)


def within_documents(queries_BS: Tensor, keys_BK: Tensor) -> Tensor:
    """``[B, S, K]``: true within a document. Padding attends to padding: a softmax over no key would be NaN."""
    return queries_BS[:, :, None] == keys_BK[:, None, :]

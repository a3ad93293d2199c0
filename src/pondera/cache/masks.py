"""Masks over slots and tokens: which rows may attend to which, and the positions of tokens.

Shapes: B batch, T tokens, S slots (rows of the call), K cached and new rows together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SlotMask:
    """Which cached rows each row of a call may attend to, when that is not plain causal order.

    Args:
        allowed_BSK: bool; batch may be 1.
        query_positions_BS: token position of each row.
        key_positions_BK: token position of each cached and new row. Positions let sliding-window layers keep their
            window in tokens, however many slots a token owns.
        log_weight_BK: added to every attention score of that row; none: all rows count alike.
    """

    allowed_BSK: Tensor
    query_positions_BS: Tensor
    key_positions_BK: Tensor
    log_weight_BK: Tensor | None = None


def token_positions(tokens: int, mask: Tensor | None, seen: int, device: torch.device) -> Tensor:
    """Positions ``[B or 1, T]`` of the last tokens: counted from the first token of each row's document.

    Args:
        tokens: T, new tokens.
        mask: ``[B, seen + T]`` token mask (0 = padding, else the document's number), or none.
        seen: tokens before them.

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
    """Whether a token or slot mask tells several documents apart."""
    return mask is not None and mask.dtype != torch.bool and bool((mask > 1).any())


def needed(mask: Tensor | None) -> Tensor | None:
    """A token mask, or none where it says nothing: all are tokens of one document."""
    return None if mask is None or bool((mask == 1).all()) else mask


def document_mask(mask_BS: Tensor) -> SlotMask:
    """Causal order within each document."""
    order_1S = torch.arange(mask_BS.shape[1], device=mask_BS.device)[None]
    allowed_BSK = within_documents(mask_BS, mask_BS) & (order_1S[:, :, None] >= order_1S[:, None, :])
    return SlotMask(allowed_BSK, order_1S, order_1S)


def within_documents(queries_BS: Tensor, keys_BK: Tensor) -> Tensor:
    """``[B, S, K]``: same document and no padding. A padding row sees its like: a softmax over nothing would be NaN."""
    return queries_BS[:, :, None] == keys_BK[:, None, :]

"""Packed documents: several documents in one batch row, separated by position ids that restart.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from pondera.core.errors import UserError


def documents(position_ids: Tensor) -> Tensor | None:
    """Document number of each token, 1, 2, ..., or `None` if every batch row is one document.

    As in transformers, a document starts where a position is not the previous one plus 1.

    Args:
        position_ids: ``[B, T]``.

    Returns:
        ``[B, T]`` or `None`.

    Example:
        >>> import torch
        >>> documents(torch.tensor([[0, 1, 2, 0, 1]])).tolist(), documents(torch.tensor([[4, 5, 6]]))
        ([[1, 1, 1, 2, 2]], None)
    """
    if position_ids.shape[-1] < 2:
        return None
    begins_BT = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return (1 + begins_BT.cumsum(-1)) if bool(begins_BT.any()) else None


def refuse_packed_cache(position_ids: Tensor) -> None:
    """Raises if positions restart in a call with a cache, which supports one document per batch row."""
    if position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) < 0).any()):
        raise UserError(
            "position_ids: they restart within a batch row, which means packed documents, but a cache supports one "
            "document per row; use no cache (use_cache=False), or one row per document"
        )

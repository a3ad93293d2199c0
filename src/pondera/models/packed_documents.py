"""Texts laid end to end in one row, told apart by position ids that begin anew.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from pondera.core.errors import UserError


def documents(position_ids: Tensor) -> Tensor | None:
    """The number of each token's document, 1, 2, ...; `None` where every row is a single one.

    As in transformers, a document begins wherever a position is not the one after the position before it.

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
    """Refuses a call with a cache whose positions go back: a cache holds one document per row."""
    if position_ids.shape[-1] > 1 and bool((position_ids.diff(dim=-1) < 0).any()):
        raise UserError(
            "position_ids: they begin anew within a row, which tells documents apart, and a cache holds one document per row; "
            "leave the cache out (use_cache=False), or give each document a row of its own"
        )

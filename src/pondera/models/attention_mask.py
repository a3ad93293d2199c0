"""Checks the attention mask of a forward call.

Shapes: B batch, T new tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pondera.core.errors import UserError


def token_mask(mask: Any, rows: int, tokens: int, seen: int, method: str | None) -> Any:
    """The mask over all tokens of a call, ``[B, seen + T]``.

    Args:
        mask: what was given. A model without a method also takes the 4-D masks of transformers, which are returned as they
            are.
        rows: B.
        tokens: T.
        seen: the number of cached tokens.
        method: the method of the model, for messages; `None`: no method.

    Raises:
        UserError: the mask has another form, too few columns, another number of rows, or negative values.
    """
    width = seen + tokens
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        if method is None:
            return mask
        form = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        raise UserError(
            f"attention_mask: {form}; {method} builds its own masks over KV slots; give ones and zeros, [{rows}, {width}]"
        )
    if mask.shape[0] not in (1, rows) or mask.shape[1] < width:
        cached = f" ({seen} cached and {tokens} new tokens)" if seen else ""
        raise UserError(
            f"attention_mask: shape {list(mask.shape)}, expected [{rows}, {width}]{cached}; give a column for every token, "
            "cached ones included"
        )
    if tokens > 1 and mask.is_signed() and bool((mask < 0).any()):
        raise UserError("attention_mask: negative values; give 1 for tokens and 0 for padding")
    return mask if method is None else mask[:, :width].expand(rows, -1)

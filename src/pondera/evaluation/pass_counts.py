"""How many tokens took each pass.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from torch import Tensor


def pass_counts(passes_BT: Tensor, most: int) -> tuple[int, ...]:
    """The number of tokens that took each of `most` passes.

    Example:
        >>> import torch
        >>> pass_counts(torch.tensor([[1, 3, 3]]), most=3)
        (3, 2, 2)
    """
    counts = passes_BT.flatten().clamp(max=most).bincount(minlength=most + 1)
    return tuple(counts.flip(0).cumsum(0).flip(0)[1:].tolist())

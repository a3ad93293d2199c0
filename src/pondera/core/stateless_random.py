"""Numbers as if drawn at random that follow from where they are drawn, so that caches, padding and batches change nothing."""

from __future__ import annotations

from torch import Tensor


def stateless_uniform(position: Tensor, depth: int, draw: int) -> Tensor:
    """A number in [0, 1) for each position, as if drawn at random.

    Args:
        position: whole numbers of any shape.
        depth: a second number it depends on, of a pass or layer.
        draw: a third, of a step or seed.

    Example:
        >>> import torch
        >>> stateless_uniform(torch.tensor([[0, 1, 2]]), depth=1, draw=0).mul(100).long().tolist()
        [[69, 84, 28]]
    """
    # Three rounds of multiply and shift spread neighbouring numbers over all bits.
    x = position.long() * 0x9E3779B1 + (depth * 0x85EBCA77 + draw * 0xC2B2AE3D) % 2**61
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return ((x >> 11) & (2**52 - 1)).double() / 2**52

"""Stateless pseudo-random numbers keyed by position: results do not depend on caching, padding or batching."""

from __future__ import annotations

from torch import Tensor


def stateless_uniform(position: Tensor, depth: int, draw: int, key: Tensor | None = None) -> Tensor:
    """A pseudo-random number in [0, 1) for each position.

    Args:
        position: integers of any shape.
        depth: second key, such as a pass or layer.
        draw: third key, such as a step or seed.
        key: fourth key, integers of a shape that broadcasts with `position`, such as token ids; default: `None`, no key.

    Example:
        >>> import torch
        >>> stateless_uniform(torch.tensor([[0, 1, 2]]), depth=1, draw=0).mul(100).long().tolist()
        [[69, 84, 28]]
    """
    # Three rounds of multiply and shift mix all bits, so that adjacent positions give unrelated numbers.
    x = position.long() * 0x9E3779B1 + (depth * 0x85EBCA77 + draw * 0xC2B2AE3D) % 2**61
    if key is not None:
        x = x + (key.long() + 1) * 0x27D4EB2F165667C5
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return ((x >> 11) & (2**52 - 1)).double() / 2**52

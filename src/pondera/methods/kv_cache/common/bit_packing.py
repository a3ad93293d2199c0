"""Numbers of a few bits, packed into bytes.

Shapes: n numbers, b bits of a number; ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """``[..., n * b / 8]``, uint8: the bits of all numbers one after another, the first number in the lowest bits.

    Args:
        numbers: ``[..., n]``, uint8, each below ``2 ** bits``; their bits fill whole bytes.
        bits: b, 1 to 8.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0, 1, 2, 3, 0], dtype=torch.uint8), 3).tolist()
        [209, 16, 13]
    """
    if bits == 8:
        return numbers
    if 8 % bits:
        place_b = torch.arange(bits, dtype=torch.uint8, device=numbers.device)
        return pack_bits(((numbers[..., None] >> place_b) & 1).flatten(-2), 1)
    places = numbers.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    packed = places[0].clone()
    for number, place in enumerate(places[1:], 1):
        packed |= place << (bits * number)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """``[..., n]``, uint8: the inverse of `pack_bits`.

    Args:
        packed: ``[..., n * b / 8]``, uint8.
        bits: b, 1 to 8.
    """
    if bits == 8:
        return packed
    if 8 % bits:
        each = unpack_bits(packed, 1).unflatten(-1, (-1, bits))
        numbers = each[..., 0].clone()
        for place in range(1, bits):
            numbers |= each[..., place] << place
        return numbers
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)

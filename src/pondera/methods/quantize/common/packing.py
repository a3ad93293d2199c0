"""Bit packing: stores each code in the minimum number of bits for its codebook, without padding between codes.

Shapes: N vectors, G groups, R levels, P = G * R codes of a vector, B bits of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.core.errors import UserError

CHUNK = 2**15
"""Number of vectors processed at a time; a multiple of 8, so that a chunk ends at a byte boundary."""


def bits_for(size: int) -> int:
    """Number of bits for a code of a codebook with `size` codes.

    Example:
        >>> [bits_for(size) for size in (1, 2, 5, 256, 257)]
        [0, 1, 3, 8, 9]
    """
    if size < 1:
        raise UserError(f"a codebook of {size} codes: give 1 or more")
    return (size - 1).bit_length()


def packed_bytes(vectors: int, sizes_GR: Tensor) -> int:
    """Number of bytes that `pack` needs for this many vectors.

    Example:
        >>> packed_bytes(3, torch.tensor([[256, 5]]))
        5
    """
    return (vectors * sum(_bits(sizes_GR)) + 7) // 8


def pack(codes_NGR: Tensor, sizes_GR: Tensor) -> Tensor:
    """Packs codes into one bit stream, ordered by vector, then by code; the lowest bit of a code comes first.

    Args:
        codes_NGR: int64, each in [0, size).
        sizes_GR: number of codes per group and level.

    Returns:
        uint8, exactly `packed_bytes` long; the last byte is padded with zero bits.

    Raises:
        UserError: a code outside its codebook, or an absent code, which has no bit pattern.

    Example:
        >>> pack(torch.tensor([[[1, 2]], [[0, 3]]]), torch.tensor([[2, 4]])).tolist()
        [53]
    """
    sizes_P, codes_NP = sizes_GR.flatten().to(codes_NGR.device), codes_NGR.flatten(1)
    if codes_NGR.shape[1:] != sizes_GR.shape:
        raise UserError(f"codes of shape {tuple(codes_NGR.shape)} for codebooks of shape {tuple(sizes_GR.shape)}")
    if (codes_NP < 0).any():
        raise UserError("absent codes cannot be packed: leave out masked vectors, and encode with all levels")
    if (codes_NP >= sizes_P).any():
        raise UserError(f"a code lies outside its codebook: there are {sizes_GR.tolist()} codes per group and level")
    place_B, shift_B = _layout(sizes_GR, codes_NGR.device)
    data = codes_NGR.new_zeros(packed_bytes(len(codes_NGR), sizes_GR), dtype=torch.uint8)
    powers = 2 ** torch.arange(8, device=codes_NGR.device)
    end = 0
    for codes_nP in codes_NP.split(CHUNK):
        bits = ((codes_nP[:, place_B] >> shift_B) & 1).flatten()
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8))
        start, end = end, end + len(bits) // 8
        data[start:end] = (bits.view(-1, 8) * powers).sum(1)
    return data


def unpack(data: Tensor, vectors: int, sizes_GR: Tensor) -> Tensor:
    """Unpacks the codes of `pack`.

    Args:
        data: uint8, `packed_bytes` long.
        vectors: N.
        sizes_GR: see `pack`.

    Returns:
        ``[N, G, R]``, int64.

    Raises:
        UserError: the bytes were not packed from this number of vectors with these sizes.
    """
    expected = packed_bytes(vectors, sizes_GR)
    if data.dtype != torch.uint8 or data.shape != (expected,):
        raise UserError(f"{vectors} vectors are {expected} bytes of uint8, got {tuple(data.shape)} of {data.dtype}")
    place_B, shift_B = _layout(sizes_GR, data.device)
    codes_NP = torch.zeros(vectors, sizes_GR.numel(), dtype=torch.int64, device=data.device)
    width = len(place_B)
    for start in range(0, vectors, CHUNK):
        codes_nP = codes_NP[start : start + CHUNK]
        wanted = len(codes_nP) * width
        chunk = data[start * width // 8 : (start * width + wanted + 7) // 8].long()
        bits = (chunk[:, None] >> torch.arange(8, device=data.device)) & 1
        codes_nP.index_add_(1, place_B, bits.flatten()[:wanted].view(len(codes_nP), width) << shift_B)
    if (codes_NP >= sizes_GR.flatten().to(data.device)).any():
        raise UserError(f"these bytes were not packed with codebooks of {sizes_GR.tolist()} codes")
    return codes_NP.view(vectors, *sizes_GR.shape)


def _bits(sizes_GR: Tensor) -> list[int]:
    """Number of bits per group and level."""
    return [bits_for(size) for size in sizes_GR.flatten().tolist()]


def _layout(sizes_GR: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bit of a vector, its code index and its bit position within the code."""
    bits = _bits(sizes_GR)
    place_B = [place for place, count in enumerate(bits) for _ in range(count)]
    shift_B = [shift for count in bits for shift in range(count)]
    return (
        torch.tensor(place_B, dtype=torch.int64, device=device),
        torch.tensor(shift_B, dtype=torch.int64, device=device),
    )

"""Codes as bytes: every code comes back, and the bytes are as many as the bits say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pondera import UserError
from pondera.methods.quantize.common import packing
from pondera.methods.quantize.common.packing import bits_for, pack, packed_bytes, unpack


def drawn(vectors: int, sizes_GR: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Codes in which every place has its highest one, too."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(vectors, *sizes_GR.shape, generator=generator, dtype=torch.float64)
    codes_NGR = (share * sizes_GR).long()
    codes_NGR[:1] = sizes_GR - 1
    return codes_NGR


def bit_by_bit(codes_NGR: torch.Tensor, sizes_GR: torch.Tensor) -> list[int]:
    """The slow twin: one long binary number."""
    number, at = 0, 0
    for vector in codes_NGR.flatten(1).tolist():
        for code, size in zip(vector, sizes_GR.flatten().tolist(), strict=True):
            number |= code << at
            at += math.ceil(math.log2(size))
    return list(number.to_bytes((at + 7) // 8, "little"))


def test_bits_are_the_ceiling_of_the_logarithm():
    for size in [*range(1, 1025), 2**17 - 1, 2**17, 2**17 + 1]:
        assert bits_for(size) == math.ceil(math.log2(size))
    with pytest.raises(UserError, match="0 codes"):
        bits_for(0)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.integers(1, 3).flatmap(
        lambda levels: st.lists(
            st.lists(st.integers(1, 2**17), min_size=levels, max_size=levels), min_size=1, max_size=4
        )
    ),
    vectors=st.integers(0, 33),
    seed=st.integers(0, 2**31),
)
def test_codes_come_back_from_exactly_the_bytes_that_their_bits_fill(sizes: list[list[int]], vectors: int, seed: int):
    sizes_GR = torch.tensor(sizes)
    codes_NGR = drawn(vectors, sizes_GR, seed)
    data = pack(codes_NGR, sizes_GR)
    assert data.dtype == torch.uint8 and len(data) == packed_bytes(vectors, sizes_GR)
    assert data.tolist() == bit_by_bit(codes_NGR, sizes_GR)
    assert torch.equal(unpack(data, vectors, sizes_GR), codes_NGR)


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch):
    sizes_GR = torch.tensor([[5, 1000], [2, 1]])
    codes_NGR = drawn(83, sizes_GR)
    whole = pack(codes_NGR, sizes_GR)
    monkeypatch.setattr(packing, "CHUNK", 16)
    assert torch.equal(pack(codes_NGR, sizes_GR), whole)
    assert torch.equal(unpack(whole, 83, sizes_GR), codes_NGR)


def test_large_codes_and_codes_that_are_not_contiguous():
    sizes_GR = torch.tensor([[2**40, 3]])
    codes_NGR = drawn(14, sizes_GR)[::2]
    assert torch.equal(unpack(pack(codes_NGR, sizes_GR), 7, sizes_GR), codes_NGR)


def test_a_codebook_of_one_code_and_no_codebook_take_no_bytes():
    for sizes_GR in (torch.ones(2, 3, dtype=torch.long), torch.ones(0, 0, dtype=torch.long)):
        codes_NGR = torch.zeros(9, *sizes_GR.shape, dtype=torch.long)
        data = pack(codes_NGR, sizes_GR)
        assert data.shape == (0,) and torch.equal(unpack(data, 9, sizes_GR), codes_NGR)


def test_what_cannot_be_packed_or_unpacked_is_refused():
    sizes_GR = torch.tensor([[5]])
    with pytest.raises(UserError, match="absent"):
        pack(torch.tensor([[[-1]]]), sizes_GR)
    with pytest.raises(UserError, match="outside its codebook"):
        pack(torch.tensor([[[5]]]), sizes_GR)
    with pytest.raises(UserError, match="shape"):
        pack(torch.tensor([[[1, 1]]]), sizes_GR)
    data = pack(torch.tensor([[[4]], [[2]], [[1]]]), sizes_GR)
    for wrong in (data[:-1], data.long(), data[None]):
        with pytest.raises(UserError, match="2 bytes"):
            unpack(wrong, 3, sizes_GR)
    with pytest.raises(UserError, match="not packed with"):
        unpack(torch.tensor([7], dtype=torch.uint8), 1, sizes_GR)

"""Attention to sections in one native call equals attention to their decoded rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pondera.cache.codec import Codec
from pondera.cache.native_sections import NativeSection, attend_natively_to_sections, dense_rows
from pondera.cache.slot_attention import attend, grouped
from pondera.kernels.build import library
from pondera.methods.kv_cache.common.codebooks import Codebooks, RotaryCodebooks
from pondera.methods.kv_cache.common.pair_codes import PairCodes
from pondera.methods.kv_cache.common.uniform_quantizer import UniformQuantizer

pytestmark = pytest.mark.skipif(library("sections") is None, reason="no compiler")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(query: Tensor, rows: list[tuple[Tensor, Tensor]], allowed: list[Tensor], scaling: float) -> Tensor:
    keys, values = (torch.cat(each, 2) for each in zip(*rows, strict=True))
    return attend(grouped(query, keys.shape[1]), keys, values, torch.cat(allowed, -1)[:, :, None], scaling)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("batch", "heads", "shared"), [(1, 1, 1), (1, 3, 3), (3, 2, 5)])
@pytest.mark.parametrize(("width", "group", "tokens"), [(8, 4, 8), (64, 32, 640), (24, 8, 72), (96, 96, 576)])
def test_exact_and_coded_sections(bits: int, batch: int, heads: int, shared: int, width: int, group: int, tokens: int):
    query = random(batch, heads * shared, 1, width)
    exact = random(2, batch, heads, 70, width, seed=1).unbind(0)
    codecs = UniformQuantizer(bits, group, True), UniformQuantizer(bits, min(group, width), False)
    given = random(2, batch, heads, tokens, width, seed=2).unbind(0)
    parts = [codec.encode(rows, None) for codec, rows in zip(codecs, given, strict=True)]
    held = [(0, max(1, tokens - 3 * row)) for row in range(batch)], [(min(69, 5 * row), 70) for row in range(batch)]
    keys, values = (codec.kernel_rows(part, None) for codec, part in zip(codecs, parts, strict=True))
    one, other = map(dense_rows, exact)
    assert keys and values and one and other
    sections = [NativeSection(keys, values, tokens, held[0]), NativeSection(one, other, 70, held[1])]
    found = attend_natively_to_sections(query, sections, heads, width, 0.3)
    decoded = [codec.decoded(part) for codec, part in zip(codecs, parts, strict=True)]
    allowed = []
    for number, ranges in zip((tokens, 70), held, strict=True):
        column = torch.arange(number)
        inside = torch.stack([(column >= start) & (column < stop) for start, stop in ranges])
        allowed.append(inside[:, None].expand(-1, heads, -1))
    right = expected(query, [(decoded[0], decoded[1]), exact], allowed, 0.3)
    torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-4)


def test_masked_slots_and_views_of_larger_storage():
    query = random(2, 6, 1, 16)
    rows = random(2, 2, 2, 300, 20, seed=1)[..., 2:18].unbind(0)
    position = torch.arange(300, dtype=torch.int32).expand(2, 2, -1).clone()
    position[torch.rand(2, 2, 300, generator=torch.Generator().manual_seed(3)) < 0.6] = -1
    position[:, :, 64:128] = -5
    keys, values = map(dense_rows, rows)
    assert keys and values
    section = NativeSection(keys, values, 300, position_BGS=position)
    found = attend_natively_to_sections(query, [section], 2, 16, 0.2)
    torch.testing.assert_close(found, expected(query, [rows], [position >= 0], 0.2), atol=1e-5, rtol=1e-4)


def test_a_query_without_a_token_gets_zeros():
    keys = dense_rows(rows := random(1, 1, 3, 4))
    assert keys
    found = attend_natively_to_sections(random(1, 1, 1, 4), [NativeSection(keys, keys, 3, [(2, 2)])], 1, 4, 1.0)
    assert found is not None and not found.any() and rows.any()


def test_what_the_kernel_cannot_read_is_refused():
    assert dense_rows(random(1, 1, 3, 4).double()) is None
    assert dense_rows(random(1, 1, 3, 8)[..., ::2]) is None
    assert attend_natively_to_sections(random(1, 1, 1, 4).bfloat16(), [], 1, 4, 1.0) is None


def tables(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed).half()


def residual(width: int, branches: int) -> Codebooks:
    """Residual codebooks of values (one branch), or of keys (two, whose coordinates alternate)."""
    dims = [torch.arange(width)] if branches == 1 else [torch.arange(0, width, 2), torch.arange(1, width, 2)]
    stages = (5,) if branches == 1 else (2, 4)
    return Codebooks([tables(n, 7, len(each), seed=n) for n, each in zip(stages, dims, strict=True)], dims, 2)


def rotary(width: int, interleaved: bool, whole: bool = False) -> RotaryCodebooks:
    """Codes of pairs, before rotary embedding; two coordinates are not rotated."""
    P = width // 2 - 1
    byte_GD = torch.arange(2)[:, None] * 2 + torch.arange(width) % 2
    if whole:  # both coordinates of a pair in one byte
        pair_D = torch.arange(width) // 2 if interleaved else torch.arange(width) % P
        byte_GD = torch.arange(2)[:, None] * 5 + pair_D % 5
    codec = PairCodes(tables(2, 9, width, seed=4), byte_GD, torch.ones(2, width))
    return RotaryCodebooks(codec, 1 / (1 + torch.arange(P).float()), interleaved)


CODECS: dict[str, Callable[[int], Codec]] = {
    "two branches": lambda width: residual(width, 2),
    "one branch": lambda width: residual(width, 1),
    "pairs": lambda width: rotary(width, False),
    "whole pairs": lambda width: rotary(width, False, whole=True),
    "whole interleaved pairs": lambda width: rotary(width, True, whole=True),
    "interleaved pairs": lambda width: rotary(width, True),
    "rotated sums": lambda width: RotaryCodebooks(residual(width, 1), torch.ones(width // 2) / 3),
}


@pytest.mark.parametrize("width", [8, 20, 32, 64, 128])
@pytest.mark.parametrize("keys", CODECS)
@pytest.mark.parametrize("tokens", [1, 63, 600, 4500])
def test_codes_with_tables(width: int, keys: str, tokens: int):
    codecs = CODECS[keys](width), residual(width, 1)
    first, position = [3, 40], torch.stack([torch.arange(3, 3 + tokens), torch.arange(40, 40 + tokens)])
    given = random(2, 2, 2, tokens, width, seed=2).unbind(0)
    parts = [codec.encode(rows, position) for codec, rows in zip(codecs, given, strict=True)]
    rows = [
        codec.kernel_rows(part, first, keys) for codec, part, keys in zip(codecs, parts, (True, False), strict=True)
    ]
    assert rows[0] and rows[1]
    query = random(2, 6, 1, width, seed=5)
    held = [(0, tokens), (0, max(1, tokens - 7))]
    found = attend_natively_to_sections(query, [NativeSection(rows[0], rows[1], tokens, held)], 2, width, 0.1)
    decoded = codecs[0].decode(parts[0], position), codecs[1].decode(parts[1], position)
    inside = torch.stack([torch.arange(tokens) < stop for _, stop in held])[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(found, expected(query, [decoded], [inside], 0.1), atol=1e-4, rtol=1e-4)


def test_codes_that_the_kernel_cannot_read_are_refused():
    wide = Codebooks([random(2, 7, 8)], [torch.arange(8)], 2)  # float32 tables
    assert wide.kernel_rows(wide.encode(random(1, 2, 5, 8)), [0]) is None
    joined = Codebooks([tables(2, 7, 16, seed=0)], [torch.arange(8)], 2, joined=2)
    assert joined.kernel_rows(joined.encode(random(1, 2, 5, 8)), [0]) is None
    pairs = rotary(8, False)
    assert pairs.kernel_rows(pairs.encode(random(1, 2, 5, 8), torch.arange(5)[None]), None) is None  # no positions

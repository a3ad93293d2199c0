"""Attention by the kernel equals attention by torch, whatever the shapes, the strides and what may be looked at."""

from __future__ import annotations

import math

import pytest
import torch

from pondera.cache.kv_store import EMPTY
from pondera.cache.native_attention import attend_natively, scores_natively
from pondera.cache.slot_attention import attend, scores, slots_allowed
from pondera.kernels.build import why_not

needs_kernel = pytest.mark.skipif(bool(why_not("attention")), reason=why_not("attention"))
pytestmark = needs_kernel

SHAPES = [  # B, G, R, T, S, D, E
    (1, 1, 1, 1, 1, 8, 8),
    (1, 2, 4, 1, 1100, 128, 128),
    (2, 3, 1, 1, 130, 60, 60),
    (1, 2, 7, 1, 77, 33, 20),
    (3, 1, 2, 3, 513, 16, 24),
    (2, 2, 6, 8, 70, 5, 3),
]


def inside(rows: int, *shape: int) -> torch.Tensor:
    """Numbers that are part of larger storage: more slots, and heads that are not in the usual order."""
    B, G, S, D = shape
    return torch.randn(G, B, S + rows, D + 3).transpose(0, 1)[:, :, rows // 2 : S + rows // 2, :D]


def case(shape: tuple[int, ...], empty: bool) -> tuple[torch.Tensor, ...]:
    B, G, R, T, S, D, E = shape
    torch.manual_seed(S)
    query = torch.randn(B, T, G * R, D).transpose(1, 2).unflatten(1, (G, R))
    position = torch.stack([torch.randperm(S + T)[:S] for _ in range(B * G)]).view(B, G, S).to(torch.int32)
    position[..., 0] = 0  # one that all may look at
    if empty and S > 1:
        position[:, :, 2::5] = -1 - position[:, :, 2::5]
        position[:, :, 1::3] = EMPTY
    return query, inside(5, B, G, S, D), inside(4, B, G, S, E), position


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torch(shape: tuple[int, ...], empty: bool, masked: bool):
    B, _, _, T, S, D, _ = shape
    query, keys, values, position = case(shape, empty)
    start = S - 1
    causal = (torch.arange(S + T) <= torch.arange(start, start + T)[:, None]).expand(B, 1, T, S + T)
    mask = causal & (torch.rand(B, 1, 1, S + T) < 0.7) if masked else None
    if mask is not None:
        mask[..., 0] = True
    allowed = slots_allowed(causal if mask is None else mask, position)
    found = attend_natively(query, keys, values, position, mask, start, D**-0.5, with_scores=True)
    assert found is not None
    out, score = found
    torch.testing.assert_close(out, attend(query, keys, values, allowed, D**-0.5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score, scores(query, keys, allowed, D**-0.5), atol=1e-5, rtol=1e-5)


def test_what_no_query_sees_changes_nothing():
    query, keys, values, position = case((2, 1, 2, 1, 300, 16, 16), False)
    position[1] = EMPTY
    keys[0, :, 5], position[0, :, 5] = math.nan, EMPTY
    found = attend_natively(query, keys, values, position, None, 400, 0.25)
    assert found is not None and found[0].isfinite().all() and (found[0][1] == 0).all()


def test_scores_far_apart_and_numbers_that_are_none():
    query, keys, values, position = case((1, 1, 2, 1, 600, 16, 16), False)
    keys[..., ::2] *= 100
    found = attend_natively(query, keys, values, position, None, 700, 1.0)
    assert found is not None
    torch.testing.assert_close(found[0], attend(query, keys, values, None, 1.0), atol=1e-5, rtol=1e-5)
    keys[0, 0, 7, 3] = math.nan
    found = attend_natively(query, keys, values, position, None, 700, 1.0)
    assert found is not None and found[0].isnan().all()


def test_threads_and_batches_change_no_bit():
    threads, (query, keys, values, position) = torch.get_num_threads(), case((3, 2, 4, 1, 1300, 64, 64), True)
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(attend_natively(query, keys, values, position, None, 1300, 0.125))
    finally:
        torch.set_num_threads(threads)
    alone = attend_natively(query[1:2], keys[1:2], values[1:2], position[1:2], None, 1300, 0.125)
    assert found[0] and found[1] and alone
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][0][1:2], alone[0])


def test_where_there_is_no_kernel():
    query, keys, values, position = case(SHAPES[1], False)
    rest = (position, None, 1100, 0.1)
    assert attend_natively(query.double(), keys.double(), values.double(), *rest) is None
    assert attend_natively(query.requires_grad_(), keys, values, *rest) is None
    with torch.no_grad():
        assert attend_natively(query, keys.mT.contiguous().mT, values, *rest) is None
        assert attend_natively(query.expand(-1, -1, -1, 9, -1), keys, values, *rest) is None
        assert attend_natively(query, keys, values, *rest) is not None


@pytest.mark.parametrize("slots", [1, 63, 130, 700])
@pytest.mark.parametrize("width", [5, 16, 40])
def test_attention_to_listed_slots_is_attention_to_their_copies(slots: int, width: int):
    draw = torch.Generator().manual_seed(slots)
    query = torch.randn(2, 2, 3, 1, width, generator=draw)
    keys, values = torch.randn(2, 2, 2, 900, width, generator=draw).unbind(0)
    position = torch.arange(900, dtype=torch.int32).expand(2, 2, -1).contiguous()
    slot_BGk = torch.rand(2, 2, 900, generator=draw).argsort(-1)[..., :slots].contiguous()
    slot_BGk[:, :, 1::5] = -1
    listed = attend_natively(query, keys, values, position, None, 899, 0.3, slot_BGk=slot_BGk)
    there_BGk = slot_BGk.clamp(min=0)
    copies = [rows.gather(2, there_BGk[..., None].expand(-1, -1, -1, width)) for rows in (keys, values)]
    allowed = (slot_BGk >= 0)[:, :, None]
    assert listed is not None
    torch.testing.assert_close(listed.out_BTHD, attend(query, *copies, allowed, 0.3), rtol=1e-5, atol=1e-6)


def test_scores_alone_are_those_that_come_with_the_output():
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 3, 3, 20, generator=draw), torch.randn(2, 3, 150, 20, generator=draw)
    position = torch.arange(150, dtype=torch.int32).expand(2, 3, -1).clone()
    position[torch.rand(2, 3, 150, generator=draw) < 0.3] = -1
    both = attend_natively(query[:, :, :, None], keys, keys, position, None, 120, 0.3, with_scores=True)
    alone = scores_natively(query, keys, position, 120, 0.3)
    assert both is not None and alone is not None and torch.equal(both.score_BGRTS, alone)

"""Attention that lets heads share what is in the cache of a core has the bits of torch's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.cache import layer
from pondera.cache import stock_attention as under_test
from pondera.cache.layer import AttentionCall
from pondera.cache.stock_attention import stock_attention
from pondera.core.hf import sdpa_attention
from pondera.kernels.build import why_not

WHY = why_not("stock") or ("" if under_test._gemm() else "torch brings no matrix product along that could be called")
WHY = WHY or ("" if under_test._same_bits(64, torch.get_num_threads()) else "the kernel's bits are not torch's here")
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows(B: int, G: int, R: int, S: int, D: int, spare: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query as the layers of a model make it, and keys and values inside larger storage."""
    torch.manual_seed(S * D + R)
    query = 2 * torch.randn(B, 1, G * R, D).transpose(1, 2)
    keys, values = torch.randn(2, B, G, S + spare, D)[:, :, :, :S].unbind()
    return query, keys, values


def torchs(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("D", [64, 128, 80, 33])
def test_bits_are_torchs(threads: int, D: int):
    """Whatever threads do, and however many keys: less than a vector, whole blocks, one more than a block."""
    for B, G, R, S in itertools.product((1, 3), (1, 3), (2, 7), (1, 5, 511, 512, 513, 1537)):
        given = rows(B, G, R, S, D)
        found = stock_attention(*given, 0.3)
        assert found is not None, (B, G, R, S)
        assert torch.equal(found, torchs(*given, 0.3)), (B, G, R, S)


def test_rows_that_do_not_lie_side_by_side(threads: int):
    """Heads of a token beside each other, and storage that is wider than a row."""
    query, keys, values = rows(2, 3, 4, 530, 64)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    values = torch.randn(2, 3, 530, 70)[..., 3:67]
    found = stock_attention(query, keys, values, 0.2)
    assert found is not None and torch.equal(found, torchs(query, keys, values, 0.2))


def test_scores_that_are_far_apart():
    """Some weights are 0, some keys win by far; one of them comes after the first block."""
    query, keys, values = rows(1, 2, 4, 1200, 64)
    keys[:, :, 700] = 20 * query[:, ::4, 0]
    keys[:, 1, 3] *= 300
    found = stock_attention(query, keys, values, 1.0)
    assert found is not None and torch.equal(found, torchs(query, keys, values, 1.0))


def test_left_to_torch_where_it_is_another_kernel():
    query, keys, values = rows(1, 2, 4, 40, 64)
    assert stock_attention(query, keys, values, 0.1) is not None
    assert stock_attention(query[:, :2], keys, values, 0.1) is None  # nothing is shared
    assert stock_attention(query.expand(-1, -1, 2, -1), keys, values, 0.1) is None
    assert stock_attention(query.bfloat16(), keys.bfloat16(), values.bfloat16(), 0.1) is None
    assert stock_attention(query, keys, values[..., :32], 0.1) is None
    assert stock_attention(query.clone().requires_grad_(), keys, values, 0.1) is None
    assert stock_attention(query, keys[:, :, :1].expand_as(keys), values, 0.1) is None  # no matrix has such steps
    wide = rows(1, 2, 4, 40, 264)
    assert stock_attention(*wide, 0.1) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert stock_attention(query, keys, values, 0.1) is None
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("further", [{"position_bias": torch.randn(1, 8, 1, 40)}, {"dropout": 0.5}, {}])
def test_another_attention_is_transformers_own(monkeypatch: pytest.MonkeyPatch, further: dict):
    """A bias on positions or dropout is no plain softmax; without either, the kernel has the call."""
    query, keys, values = rows(1, 2, 4, 40, 64)
    module = nn.Module()
    module.num_key_value_groups = 4
    asked = []
    monkeypatch.setattr(layer, "stock_attention", lambda *given: asked.append(given))
    call = AttentionCall(module, query, keys[:, :, -1:], values[:, :, -1:], None, 0.125, 39, further)
    torch.manual_seed(0)
    found = call.stock(keys, values)
    torch.manual_seed(0)
    assert torch.equal(found, sdpa_attention(module, query, keys, values, None, scaling=0.125, **further)[0])
    assert bool(asked) == (not further)


def test_other_bits_are_never_handed_out(monkeypatch: pytest.MonkeyPatch):
    given = rows(1, 2, 4, 40, 64)
    real = under_test._run
    monkeypatch.setattr(under_test, "_run", lambda *args: real(*args) * (1 + 2**-20))
    monkeypatch.setattr(under_test, "_same_bits", under_test._same_bits.__wrapped__)
    assert stock_attention(*given, 0.1) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_leaves_it_to_torch():
    """Its threads are gone there; what is left must neither wait for them nor be wrong."""
    given = rows(1, 2, 4, 600, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = stock_attention(*given, 0.1)
    child = os.fork()
    if child == 0:
        os._exit(0 if stock_attention(*given, 0.1) is None else 1)
    _, status = os.waitpid(child, 0)
    torch.set_num_threads(before)
    assert expected is not None and os.waitstatus_to_exitcode(status) == 0

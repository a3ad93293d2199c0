"""The kernel of uniform quantization against the operations of torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from pondera.kernels.build import library
from pondera.methods.kv_cache.common.uniform_quantizer import UniformQuantizer

needs_kernel = pytest.mark.skipif(library("uniform") is None, reason="no native kernels here")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded(bits: int, group: int, by_channel: bool, shape: tuple[int, ...]):
    codec = UniformQuantizer(bits, group, by_channel)
    return codec, codec.encode(random(*shape), None)


CASES = [
    (bits, group, by_channel, shape)
    for bits, by_channel in itertools.product((1, 2, 4, 8), (True, False))
    for group, shape in ((4, (1, 1, 4, 8)), (8, (2, 3, 40, 24)), (32, (1, 2, 320, 64)), (96, (1, 1, 288, 96)))
]


@needs_kernel
@pytest.mark.parametrize("bits, group, by_channel, shape", CASES)
def test_the_kernel_decodes_multiplies_and_mixes(bits: int, group: int, by_channel: bool, shape: tuple[int, ...]):
    codec, parts = coded(bits, group, by_channel, shape)
    B, G, S, D = shape
    expected = codec.decoded(parts)
    torch.testing.assert_close(codec.decode(parts, None), expected, atol=1e-6, rtol=1e-6)
    query, weight = random(B, G, 3, D, seed=1), random(B, G, 5, S, seed=2)
    torch.testing.assert_close(codec.dot(query, parts), query @ expected.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codec.mix(weight, parts), weight @ expected, atol=1e-4, rtol=1e-4)


@needs_kernel
@pytest.mark.parametrize("by_channel", [True, False])
def test_views_of_larger_storage(by_channel: bool):
    codec, parts = coded(4, 8, by_channel, (2, 2, 32, 16))
    stored = {}
    for name, part in parts.items():
        stored[name] = part.new_zeros(3, 2, part.shape[2] + 5, part.shape[3])
        stored[name][1:, :, : part.shape[2]] = part
    views = {name: rows[1:, :, : parts[name].shape[2]] for name, rows in stored.items()}
    assert torch.equal(codec.decode(views, None), codec.decode(parts, None))
    query = random(2, 2, 1, 16)
    assert torch.equal(codec.dot(query, views), codec.dot(query, parts))


@needs_kernel
def test_infinite_and_subnormal_steps():
    codec = UniformQuantizer(4, 4, by_channel=False)
    x = torch.tensor([[[[0.0, 1e-7, 2e-7, 3e-7], [-9e4, 0.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]]]])
    parts = codec.encode(x, None)
    torch.testing.assert_close(codec.decode(parts, None), codec.decoded(parts), equal_nan=True, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_of_other_dtypes(dtype: torch.dtype):
    codec, parts = coded(4, 8, True, (1, 2, 16, 16))
    query = random(1, 2, 3, 16).to(dtype)
    found, expected = codec.dot(query, parts), query.double() @ codec.decoded(parts).double().mT
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_queries_pass():
    codec, parts = coded(4, 8, True, (1, 1, 16, 16))
    query = random(1, 1, 2, 16).requires_grad_()
    codec.dot(query, parts).sum().backward()
    assert query.grad is not None and bool(query.grad.any())


def test_without_the_kernel_results_are_the_same(monkeypatch: pytest.MonkeyPatch):
    codec, parts = coded(2, 8, True, (1, 2, 16, 16))
    query = random(1, 2, 3, 16)
    native = codec.dot(query, parts)
    monkeypatch.setenv("PONDERA_NATIVE", "0")
    torch.testing.assert_close(codec.dot(query, parts), native, atol=1e-4, rtol=1e-4)


def test_no_tokens():
    codec = UniformQuantizer(4, 8, by_channel=False)
    parts = codec.encode(torch.zeros(1, 2, 0, 16), None)
    assert codec.decode(parts, None).shape == (1, 2, 0, 16)

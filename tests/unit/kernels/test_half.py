"""Products of half precision that are computed in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.kernels import half
from pondera.kernels.half import in_float32
from pondera.kernels.linear import use_kernels

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def cpu_without_instructions(monkeypatch):
    monkeypatch.setattr(half, "_slow", lambda dtype: True)


def drawn(rows: int, dtype: torch.dtype, inputs: int = 75, outputs: int = 7):
    draw = torch.Generator().manual_seed(rows)
    return (torch.randn(*shape, generator=draw).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [9, 64])
def test_it_is_the_product_of_the_same_numbers(rows: int, dtype: torch.dtype):
    x, weight, bias = drawn(rows, dtype)
    with torch.no_grad():
        found = in_float32(x.view(1, rows, -1), weight, bias)
        assert found is not None and found.dtype == dtype
        right = F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(
            found[0], right.to(dtype), rtol=2 ** -(7 if dtype == torch.bfloat16 else 10), atol=1e-4
        )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("dtype", HALF)
def test_gradients(wanted: tuple[int, ...], dtype: torch.dtype):
    def gradients(product, as_: torch.dtype):
        x, *others = drawn(20, dtype)
        tensors = (x.view(2, 10, 75), *others)
        given = [tensor.to(as_).requires_grad_(number in wanted) for number, tensor in enumerate(tensors)]
        out = product(*given)
        weights = torch.arange(out.numel(), device="cpu").view(out.shape).remainder(5).to(as_)
        return torch.autograd.grad((out * weights).sum(), [given[number] for number in wanted])

    for found, right in zip(gradients(in_float32, dtype), gradients(F.linear, torch.float64), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, right.to(dtype), rtol=2 ** -(7 if dtype == torch.bfloat16 else 10), atol=1e-3)


def test_where_torch_multiplies():
    with torch.no_grad():
        assert in_float32(*drawn(8, torch.bfloat16)) is None  # few rows
        assert in_float32(*drawn(20, torch.float32)) is None
        x, weight, bias = drawn(20, torch.bfloat16)
        assert in_float32(x.float(), weight, bias) is None
        assert in_float32(x.to("meta"), weight, bias) is None
        with torch.autocast("cpu"):
            assert in_float32(x, weight, bias) is None


def test_a_cpu_with_instructions_uses_them(monkeypatch):
    monkeypatch.setattr(half, "_slow", lambda dtype: False)
    with torch.no_grad():
        assert in_float32(*drawn(20, torch.bfloat16)) is None


@pytest.mark.parametrize(
    "text, slow",
    [
        ("model name : x\nflags\t\t: fpu avx512f\n", True),
        ("flags : fpu avx512f avx512_bf16\n", False),
        ("Features : asimd\n", True),
        ("Features : asimd bf16\n", False),
        ("nothing\n", False),
    ],
)
def test_the_flags_of_the_cpu(monkeypatch, text: str, slow: bool):
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: text)
    assert half._slow.__wrapped__(torch.bfloat16) == slow


@pytest.mark.parametrize("dtype", HALF)
def test_layers_use_it(dtype: torch.dtype, monkeypatch):
    calls = []
    monkeypatch.setattr("pondera.kernels.linear.in_float32", lambda *given: calls.append(given) or in_float32(*given))
    layer = nn.Linear(75, 7).to(dtype)
    x = next(drawn(30, dtype))
    with torch.no_grad():
        right = layer(x)
        if not use_kernels(layer, "native"):
            pytest.skip("no compiler")
        torch.testing.assert_close(layer(x), right)
    assert len(calls) == 1

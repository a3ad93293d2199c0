"""Products of a few rows: torch's own, for every shape, dtype and instruction set; and refused where they would not be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pondera.kernels.build import library, why_not
from pondera.kernels.products import FEW, SETS, few_rows, instruction_set

available = pytest.mark.skipif(bool(why_not("products")), reason=why_not("products"))
BFLOAT_STEP = 2.0**-8
"""Half the distance of neighbours in bfloat16, relative."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@torch.no_grad()
def native(*arguments: Tensor | None, set_: int = -1) -> Tensor:
    x, weight, bias, scale = (*arguments, None, None)[:4]
    found = few_rows(x, weight, bias, scale, set_)  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found


def expected(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """The product in float64, of the dtype of x."""
    table = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    return F.linear(x.double(), table, None if bias is None else bias.double()).to(x.dtype)


def near(*arguments: Tensor | None, set_: int = -1) -> bool:
    """Whether the kernel is off by at most a millionth of the sum of the sizes; in bfloat16 also by its rounding."""
    found, right = native(*arguments, set_=set_), expected(*arguments)  # pyright: ignore[reportArgumentType]
    assert found.shape == right.shape and found.dtype == right.dtype
    x, *others = (None if each is None else each.double().abs() for each in arguments)
    size = expected(x, *others)  # pyright: ignore[reportArgumentType]
    rounding = 2 * BFLOAT_STEP * right.double().abs() if found.dtype == torch.bfloat16 else 0
    return bool(((found.double() - right.double()).abs() <= 1e-6 * size + rounding).all())


@available
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, FEW),
    inputs=st.integers(1, 100) | st.sampled_from((576, 1023, 4099)),
    outputs=st.integers(1, 70) | st.sampled_from((256, 601)),
    kind=st.sampled_from((torch.float32, torch.bfloat16, torch.int8)),
    halves=st.booleans(),
    biased=st.booleans(),
    by_input=st.booleans(),
    set_=st.integers(-1, len(SETS) - 1),
)
def test_the_product_of_torch(rows, inputs, outputs, kind, halves, biased, by_input, set_):
    dtype = (torch.bfloat16 if halves else torch.float32) if kind == torch.int8 else kind
    x, bias, scale = drawn(rows, inputs, dtype=dtype), drawn(outputs, dtype=dtype) if biased else None, None
    weight = drawn(outputs, inputs, dtype=dtype, seed=1)
    if kind == torch.int8:
        weight, scale = torch.randint(-128, 128, weight.shape, dtype=torch.int8), drawn(outputs)
    weight = weight.T.contiguous().T if by_input else weight
    assert near(x, weight, bias, scale, set_=set_)


@available
def test_shapes_and_strides_of_x():
    weight = drawn(5, 33)
    for x in (drawn(33), drawn(1, 1, 33), drawn(2, 4, 33), drawn(4, 1, 66)[..., ::2], drawn(33, 6).T):
        assert near(x, weight)


@available
@pytest.mark.parametrize("inputs", [40, 1536])
def test_a_row_does_not_depend_on_the_others_nor_on_threads(inputs: int, monkeypatch: pytest.MonkeyPatch):
    x, weight, bias = drawn(FEW, inputs), drawn(1111, inputs, seed=1), drawn(1111)
    for table in (weight, weight.T.contiguous().T):
        together = native(x, table, bias)
        for rows in range(1, FEW):
            assert torch.equal(native(x[-rows:], table, bias), together[-rows:])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 5)
            assert torch.equal(native(x, table, bias), together)


@available
def test_what_is_not_finite_stays_so():
    x, weight = drawn(1, 20), drawn(4, 20)
    weight[0, 3], weight[1, 17], weight[2, 0] = torch.inf, torch.nan, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(native(x.to(dtype), weight.to(dtype))[0].isfinite(), torch.tensor([False] * 3 + [True]))


@available
def test_bfloat_rounds_as_torch_does():
    weight = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    third = torch.tensor([[1 / 3]], dtype=torch.bfloat16)
    right = (weight.float() * third.float())[:, 0].bfloat16()
    assert torch.equal(native(third, weight.contiguous())[0].nan_to_num(7.0), right.nan_to_num(7.0))


def test_what_the_kernel_does_not_read():
    x, weight, bias = drawn(2, 16), drawn(6, 16), drawn(6)
    wide = drawn(FEW + 1, 16)
    scale = torch.ones(6)
    refused = [
        (wide, weight, None, None),
        (drawn(0, 16), weight, None, None),
        (x, drawn(0, 16), None, None),
        (drawn(2, 0), drawn(6, 0), None, None),
        (x, drawn(6, 32)[:, ::2], None, None),
        (x, weight, drawn(12)[::2], None),
        (x.double(), weight.double(), None, None),
        (x.half(), weight.half(), None, None),
        (x, weight.bfloat16(), None, None),
        (x, weight, bias.bfloat16(), None),
        (x, weight.to(torch.int8), None, None),
        (x, weight.to(torch.int8), None, scale.double()),
        (x, weight, None, scale),
        (drawn(2, 15), weight, None, None),
        (x.to("meta"), weight.to("meta"), None, None),
    ]
    with torch.no_grad():
        assert all(few_rows(*arguments) is None for arguments in refused)


def test_never_where_torch_looks_on(monkeypatch: pytest.MonkeyPatch):
    x, weight = drawn(2, 16), drawn(6, 16)
    assert few_rows(x, weight) is None  # gradients
    with torch.no_grad():
        with FlopCounterMode(display=False):
            assert few_rows(x, weight) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert few_rows(x, weight) is None
        monkeypatch.setenv("PONDERA_NATIVE", "0")
        assert few_rows(x, weight) is None and instruction_set() == ""


@available
def test_the_instruction_set_is_that_of_the_cpu():
    flags = torch.backends.cpu.get_cpu_capability()  # what torch's own kernels use: DEFAULT, AVX2, AVX512
    best = instruction_set()
    assert best in SETS and (flags != "AVX512" or best == "AVX-512") and (flags != "AVX2" or best != "plain C")
    assert hasattr(library("products"), "products")

"""Products of many rows in int8: those of the rounded rows, the same bits for any number of rows, and named refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import architectures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.kernels import int8
from pondera.kernels.build import why_not
from pondera.kernels.int8 import Int8, quantized, use_int8
from pondera.kernels.int8_rows import GROUP, as_int8, many_rows

pytestmark = pytest.mark.skipif(bool(why_not("int8_rows")), reason="no compiler")


def drawn(rows: int, inputs: int, outputs: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    return x, *quantized(weight), bias


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 110),
    biased=st.booleans(),
    plain=st.booleans(),
)
def test_it_is_the_product_of_rounded_rows(rows: int, inputs: int, outputs: int, biased: bool, plain: bool):
    x, codes, scale, bias = drawn(rows, inputs, outputs, seed=rows + inputs)
    x *= torch.logspace(-3, 3, inputs)  # groups of very different sizes
    with torch.no_grad():
        found = many_rows(x, codes, scale, bias if biased else None, plain)
    assert found is not None
    right = F.linear(as_int8(x).double(), (codes * scale[:, None]).double(), bias.double() if biased else None)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@torch.no_grad()
def test_each_number_is_off_by_half_a_step_of_its_group():
    x = torch.randn(5, 3 * GROUP + 7, generator=torch.Generator().manual_seed(0))
    x[0, 40] = 1000.0
    off = (as_int8(x) - x).abs()
    for first in range(0, x.shape[1], GROUP):
        group = slice(first, first + GROUP)
        assert (off[:, group] <= x[:, group].abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert (
        off[0, :GROUP].max() < 0.02 and as_int8(torch.zeros(2, 3)).eq(0).all()
    )  # a large number is alone in its group


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_do_not_depend_on_others_threads_or_instructions(threads: int):
    x, codes, scale, bias = drawn(1100, 70, 130)  # two blocks of rows, and two of outputs
    alone = torch.cat([many_rows(x[n : n + 1], codes, scale, bias) for n in (0, 5, 1023, 1024, 1099)])  # pyright: ignore
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = many_rows(x.view(11, 100, 70), codes, scale, bias)
        assert together is not None and together.shape == (11, 100, 130)
        assert torch.equal(together.view(1100, 130)[[0, 5, 1023, 1024, 1099]], alone)
        assert torch.equal(many_rows(x[:50], codes, scale, bias, plain=True), together.view(1100, 130)[:50])  # pyright: ignore
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_numbers_that_are_not_finite_stay_visible():
    x, codes, scale, bias = drawn(4, 70, 9)
    x[1, 3], x[2, 65] = float("nan"), float("inf")
    found = many_rows(x, codes, scale, bias)
    assert found is not None and found[[1, 2]].isnan().all() and found[[0, 3]].isfinite().all()


@torch.no_grad()
def test_bfloat16_and_what_the_kernel_does_not_take():
    x, codes, scale, bias = drawn(20, 70, 9)
    half = many_rows(x.bfloat16(), codes, scale, bias.bfloat16())
    assert half is not None and half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), F.linear(x, codes * scale[:, None], bias), rtol=0.1, atol=1.0)
    refused = (
        (x.double(), codes, scale, None),
        (x[:, :60], codes, scale, None),
        (x, codes.T.contiguous().T, scale, None),
        (x, codes, scale.double(), None),
        (x, codes, scale, bias.bfloat16()),
        (x[:0], codes, scale, None),
    )
    assert all(many_rows(*arguments) is None for arguments in refused)
    with torch.enable_grad():
        assert many_rows(x.requires_grad_(), codes, scale) is None


@torch.no_grad()
def test_a_model_that_reads_prompts_in_int8(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    config = {**copy.deepcopy(architectures.BACKBONES["llama"]), "initializer_range": 0.1}
    model = AdaptiveLM(AdaptiveConfig(backbone=config)).eval()
    weights_only, both, x = copy.deepcopy(model), copy.deepcopy(model), architectures.ids(2, 30)
    use_int8(weights_only.backbone.lm)
    use_int8(both.backbone.lm, prompts=True)
    right, found = weights_only(x).logits, both(x).logits
    assert 0 < (found - right).norm() / right.norm() < 0.02
    assert torch.equal(both(x[:1, :5]).logits, weights_only(x[:1, :5]).logits)  # few rows are not rounded
    monkeypatch.setattr(Int8, "_floats", lambda self, dtype: pytest.fail("weights as floats"))
    assert torch.equal(both(x).logits, found)


def test_without_the_kernel_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(architectures.BACKBONES["llama"]))).eval()
    with pytest.raises(UserError, match="weights='int8'"):
        use_int8(model.backbone.lm, native=False, prompts=True)
    monkeypatch.setattr(int8, "why_not", lambda name: "no C compiler")
    with pytest.raises(UserError, match="no C compiler"):
        use_int8(model.backbone.lm, prompts=True)

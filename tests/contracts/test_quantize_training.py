"""The contract tests of quantizers that concern training: state, gradients, warm-up and vectors that are not finite.

Loaded quantizers equal the original, and evaluating changes nothing.
"""

from __future__ import annotations

import pytest
import torch
from helpers.quantizers import (
    CASES,
    CODED,
    NO_GRADIENT,
    OWN_GRADIENT,
    WIDTH,
    built,
    described,
    same,
    shown,
    state,
    vectors,
)

from pondera import UserError
from pondera.core import spec
from pondera.methods.quantize.base import ABSENT


class TestState:
    """A checkpoint contains the whole state."""

    @pytest.mark.parametrize("case", CASES)
    def test_saved_and_loaded_it_goes_on_alike(self, case: str):
        quantizer, other = built(case), built(case, seed=1)
        other.load_state_dict(quantizer.state_dict())
        same(shown(quantizer.eval()(vectors(8))), shown(other.eval()(vectors(8))))
        for one in (quantizer.train(), other.train()):
            one.begin_step(3, 0)
            one(vectors(32, seed=5))
            one.begin_step(4, 0)
        same(state(quantizer), state(other))

    @pytest.mark.parametrize("case", CASES)
    def test_evaluating_changes_nothing(self, case: str):
        quantizer = built(case)
        quantizer.begin_step(3, 0)
        before = state(quantizer.eval())
        found = quantizer(vectors(40, seed=3) * 3)
        quantizer.encode(vectors(4)), found.health, quantizer.table(), quantizer.fold()
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_encoding_in_training_mode_changes_nothing(self, case: str):
        quantizer = built(case)
        before = state(quantizer)
        codes = quantizer.encode(vectors(4))
        assert not codes.requires_grad
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_processes_with_equal_steps_and_vectors_agree(self, case: str):
        a, b = built(case), built(case)
        for step in range(3, 9):
            for one in (a, b):
                one.begin_step(step, 1)
            same(shown(a(vectors(30, seed=step))), shown(b(vectors(30, seed=step))))
        same(state(a), state(b))


class TestGradient:
    """The gradient of the input from the output."""

    @pytest.mark.parametrize("case", CASES)
    def test_straight_through_none_or_its_own(self, case: str):
        quantizer, x = built(case), vectors(7).requires_grad_()
        quantizer.begin_step(300, 0)
        weight = torch.randn(7, WIDTH)
        found = quantizer(x)
        if found.out.requires_grad:
            (found.out * weight).sum().backward()
        if case in OWN_GRADIENT:
            assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
            assert not torch.allclose(x.grad, weight)
        elif case in NO_GRADIENT:
            assert x.grad is None or not x.grad.any()
        else:
            torch.testing.assert_close(x.grad, weight)

    @pytest.mark.parametrize("case", CASES)
    def test_weights_all_get_one_where_the_loss_is_trained(self, case: str):
        """Distributed training waits for the gradient of every weight."""
        quantizer = built(case)
        for step in range(3, 7):
            quantizer.begin_step(step, 0)
            quantizer.zero_grad()
            found = quantizer(vectors(7).requires_grad_())
            (found.out.sum() + found.loss).backward()
            assert all(weight.grad is not None for weight in quantizer.parameters() if weight.requires_grad)


class TestWarmUp:
    """Vectors pass unchanged until the start step, and until data has initialized the codebooks."""

    @pytest.mark.parametrize(
        "case",
        [
            "VQ(5, start_step=2)",
            "VQ(5, init='kmeans', start_step=2)",
            "SimVQ(5, init='match', start_step=2)",
            "Residual(VQ(5, init='kmeans', start_step=2), levels=3)",
            "Product(Residual(VQ(5, start_step=2), levels=2), groups=2)",
            "Residual(Product(SimVQ(4, init='match', start_step=2), groups=3), levels=2)",
        ],
    )
    def test_vectors_pass(self, case: str):
        quantizer = described(case).build(WIDTH)
        for step in range(4):
            quantizer.begin_step(step, 0)
            x = vectors(64, seed=step).requires_grad_()
            found = quantizer(x)
            assert torch.equal(found.codes, quantizer.encode(x))
            if step < 2:
                assert torch.equal(found.out, x) and not found.terms and (found.codes == ABSENT).all()
                assert torch.autograd.grad(found.out.sum(), x)[0].eq(1).all()
            else:
                assert (found.codes != ABSENT).all() and torch.equal(found.out, quantizer.decode(found.codes))

    def test_waiting_for_vectors(self):
        quantizer = described("Product(VQ(5, init='kmeans'), groups=2)").build(WIDTH)
        assert torch.equal(quantizer.eval()(vectors(3)).out, vectors(3))
        with pytest.raises(UserError, match="before folding"):
            quantizer.fold()
        quantizer.train()(vectors(50))
        assert (quantizer.eval().encode(vectors(3)) >= 0).all()


# Vectors that contain inf or nan


BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("stepped", [True, False], ids=["begin_step", "alone"])
@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("case", CODED)
def test_a_broken_vector_is_left_out_of_all_statistics(case: str, broken: float, stepped: bool):
    """From the first batch on, the state after a batch with such a vector equals the state after a batch without it."""
    x = vectors(2, 40)
    x[0, 3, 2], x[1, 5, 0] = broken, broken
    states = []
    for given in (x[0], x[0][x[0].isfinite().all(-1)]):
        torch.manual_seed(0)
        quantizer = described(case).build(WIDTH).train()
        for step, batch in enumerate((given, vectors(40, seed=1), vectors(40, seed=2))):
            if stepped:
                quantizer.begin_step(step, 7)
            quantizer(batch)
        states.append(state(quantizer))
    same(*states, atol=1e-6, rtol=1e-5)
    assert all(value.isfinite().all() for value in states[0].values() if value.is_floating_point())


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("case", CODED)
def test_a_broken_vector_gets_codes_that_exist_and_spoils_no_other(case: str, broken: float):
    quantizer, x = built(case).eval(), vectors(12)
    bad = x.clone()
    bad[3, 2] = broken
    codes, others = quantizer(bad).codes, torch.arange(12) != 3
    assert ((codes >= 0) & (codes < quantizer.sizes)).all()
    assert torch.equal(codes[others], quantizer(x).codes[others])
    assert torch.equal(quantizer.encode(bad), codes)
    assert quantizer.decode(codes).isfinite().all()
    assert quantizer(bad).health.vectors == 11


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_said_once(masked: bool, caplog: pytest.LogCaptureFixture):
    quantizer = (
        spec.build("Residual(Product(VQ(4, update='ema'), groups=2), levels=2)", "quantize").build(WIDTH).train()
    )
    x = vectors(20)
    x[3] = float("nan")
    mask = torch.arange(20) != 3 if masked else None
    for _ in range(3):
        quantizer(x, mask)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if masked else 1)
    assert masked or "1 of 20 vectors contain inf or nan" in said[0]


def test_a_batch_of_nothing_else_is_no_batch():
    for case in ("VQ(4, update='ema', init='kmeans', respawn=0.5)", "Scalar(4)", "LFQ()", "SimVQ(4, init='match')"):
        torch.manual_seed(0)
        quantizer = described(case).build(WIDTH).train()
        before = state(quantizer)
        quantizer(vectors(20) * float("nan"))
        after = state(quantizer)
        same(
            {name: after[name] for name in after if name != "step"},
            {name: before[name] for name in before if name != "step"},
        )

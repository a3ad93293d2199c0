"""Residual quantization against the loop by hand; gradients, dropout, and starting level by level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.base import ABSENT
from pondera.methods.quantize.common.estimator import rotate
from pondera.methods.quantize.product import Product
from pondera.methods.quantize.residual import Residual
from pondera.methods.quantize.sim_vq import SimVQ
from pondera.methods.quantize.vq import VQ


def made(quantizer: Residual, dim: int = 4, seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return quantizer.build(dim)


def by_hand(x_ND: Tensor, tables: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Codes ``[N, R]``, what each level got, and what it made of it."""
    rest, codes, rests, rows = x_ND, [], [], []
    for table_KD in tables:
        codes.append(torch.stack([(vector - table_KD).square().sum(-1).argmin() for vector in rest]))
        rests.append(rest)
        rows.append(table_KD[codes[-1]])
        rest = rest - rows[-1].detach()
    return torch.stack(codes, 1), rests, rows


class TestByHand:
    """One level after another, on what is left."""

    @pytest.mark.parametrize("of", [VQ(6), SimVQ(6)], ids=repr)
    def test_codes_vectors_and_terms(self, of: VQ | SimVQ):
        quantizer, x = made(Residual(of, levels=3)), torch.randn(20, 4)
        tables = [part.table()[0, 0] for part in quantizer.each()]
        codes, rests, rows = by_hand(x, tables)
        found = quantizer(x)
        assert torch.equal(found.codes[:, 0], codes)
        torch.testing.assert_close(found.out, sum(rows))
        assert torch.equal(quantizer.table()[0], torch.stack(tables))
        mean = torch.stack([(a - b).square().mean() for a, b in zip(rests, rows, strict=True)]).mean()
        for name, weight in (("codebook", 1.0), ("commitment", 0.25)):
            term = found.terms[name]
            assert term.count == 3 * x.numel() and term.weight == weight
            torch.testing.assert_close(term.mean(), mean)
        torch.testing.assert_close(found.loss, 1.25 * mean)

    def test_gradients_of_the_terms(self):
        quantizer, x = made(Residual(VQ(6), levels=3)), torch.randn(20, 4, requires_grad=True)
        quantizer(x).loss.backward()
        tables = [part.table()[0, 0].detach().requires_grad_() for part in quantizer.each()]
        y = x.detach().requires_grad_()
        _, rests, rows = by_hand(y, tables)
        pairs = list(zip(rests, rows, strict=True))
        sum(((q - r.detach()) ** 2 + 0.25 * (r - q.detach()) ** 2).mean() / 3 for r, q in pairs).backward()
        torch.testing.assert_close(x.grad, y.grad)
        for part, table in zip(quantizer.each(), tables, strict=True):
            torch.testing.assert_close(part.rows_KC.grad, table.grad)

    def test_errors_shrink_level_by_level(self):
        quantizer, x = made(Residual(VQ(8, init="kmeans"), levels=5)), torch.randn(300, 4)
        codes = quantizer(x).codes
        errors = [(x - quantizer.decode(codes[..., :levels])).square().mean().item() for levels in range(6)]
        assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:], strict=False))

    def test_small_rests_of_16_bit_vectors_are_not_lost(self):
        quantizer, x = made(Residual(VQ(64, init="kmeans"), levels=6), dim=2), torch.randn(400, 2).bfloat16()
        quantizer(x)
        exact, rounded = quantizer.eval()(x.float()).out, quantizer(x).out
        assert torch.equal(rounded, exact.bfloat16()) and (exact - x.float()).square().mean() < 1e-4


class TestEstimator:
    """It acts once, from the whole vector to the sum."""

    def test_straight_through_is_the_identity(self):
        quantizer, x = made(Residual(VQ(6), levels=3)), torch.randn(5, 4, requires_grad=True)
        assert torch.autograd.grad(quantizer(x).out.sum(), x)[0].eq(1).all()

    @pytest.mark.parametrize(
        "of", [SimVQ(6, estimator="rotation"), Product(SimVQ(6, estimator="rotation"), groups=2)], ids=repr
    )
    def test_rotation_is_that_of_the_whole(self, of: SimVQ | Product):
        quantizer, x = made(Residual(of, levels=3)), torch.randn(5, 4, requires_grad=True)
        weight, found = torch.randn(5, 4), quantizer(x)
        (gradient,) = torch.autograd.grad((found.out * weight).sum(), x)
        (expected,) = torch.autograd.grad((rotate(x, found.out.detach()) * weight).sum(), x)
        torch.testing.assert_close(gradient, expected)

    def test_none_teaches_the_codebooks_instead(self):
        quantizer, x = made(Residual(VQ(6, estimator="none"), levels=2)), torch.randn(5, 4, requires_grad=True)
        quantizer(x).out.square().sum().backward()
        assert x.grad is None or not x.grad.any()
        assert all(part.rows_KC.grad.any() for part in quantizer.each())


class TestDropout:
    """A training step runs only the first levels, the same on every rank."""

    def kept(self, quantizer: Residual, step: int, seed: int = 3) -> int:
        quantizer.begin_step(step, seed)
        present = quantizer(torch.randn(2, 4)).codes[0, 0] != ABSENT
        assert not present.int().diff().gt(0).any()  # the first ones
        return int(present.sum())

    def test_it_is_drawn_from_step_and_seed(self):
        a, b = made(Residual(VQ(4), levels=4, dropout=0.6)), made(Residual(VQ(4), levels=4, dropout=0.6), seed=1)
        drawn = [self.kept(a, step) for step in range(300)]
        assert drawn == [self.kept(b, step) for step in range(300)]
        assert drawn != [self.kept(b, step, seed=4) for step in range(300)]
        counts = [drawn.count(number) / 300 for number in range(5)]
        assert counts[0] == 0
        torch.testing.assert_close(torch.tensor(counts[1:]), torch.tensor([0.15, 0.15, 0.15, 0.55]), atol=0.06, rtol=0)

    def test_groups_agree(self):
        quantizer = Product(Residual(VQ(4), levels=4, dropout=1.0), groups=2).build(4)
        for step in range(8):
            quantizer.begin_step(step, 0)
            absent = quantizer(torch.randn(1, 4)).codes[0] == ABSENT
            assert torch.equal(absent[0], absent[1])

    def test_what_is_left_out_neither_counts_nor_learns(self):
        quantizer, x = made(Residual(VQ(4, update="ema"), levels=3, dropout=1.0)), torch.randn(9, 4)
        steps = iter(range(99))
        while self.kept(quantizer, next(steps)) != 1:
            pass
        before = [{name: b.clone() for name, b in part.state_dict().items()} for part in quantizer.each()]
        found = quantizer(x)
        assert found.terms["commitment"].count == x.numel()
        assert torch.equal(found.out, quantizer.decode(found.codes)) and found.table.shape == (1, 3, 4, 4)
        quantizer.begin_step(200, 0)
        for number, part in enumerate(quantizer.each()):
            moved = any(not torch.equal(b, before[number][n]) for n, b in part.state_dict().items() if n != "step")
            assert moved == (number == 0)

    def test_only_training_steps_drop(self):
        quantizer = made(Residual(VQ(4), levels=8, dropout=1.0))
        full = [self.kept(quantizer.eval(), step) for step in range(5)]
        assert full == [8] * 5 and self.kept(quantizer.train(), -1) == 8
        assert min(self.kept(quantizer, step) for step in range(20)) < 8
        assert (quantizer(torch.randn(2, 4), levels=8).codes >= 0).all()
        assert self.kept(quantizer.fold().train(), 0) == 8


def test_levels_start_from_what_is_left_not_from_the_zeros_of_the_warm_up():
    quantizer = made(Residual(VQ(8, init="kmeans", start_step=3), levels=3))
    for step in range(4):
        x = torch.randn(400, 4) + 9
        quantizer.begin_step(step, 0)
        found = quantizer(x)
        assert torch.equal(found.out, x) == (step < 3)
        assert all(weight.grad is None for weight in quantizer.parameters())
        (found.out.sum() + found.loss).backward()
        assert all(weight.grad is not None for weight in quantizer.parameters())
        quantizer.zero_grad()
    assert (found.out - x).square().mean() < 0.2
    for part, kept in zip(quantizer.each(), (256, 256, 256), strict=True):
        assert len(part.gate.vectors()) == kept and part.gate.vectors().any(-1).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Residual(4, levels=2), "give a quantizer"),
        (lambda: Residual(VQ(4).build(2), levels=2), "already built"),
        (lambda: Residual(VQ(4), levels=0), "give 1 or more"),
        (lambda: Residual(VQ(4), levels=2, dropout=1.5), "probability"),
    ],
)
def test_bad_arguments(wrong, said: str):
    with pytest.raises(UserError, match=said):
        wrong()

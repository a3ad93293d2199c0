"""Quantizers whose codes are no rows of a table (FSQ, LFQ, Scalar), and Identity, against the definition in full."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.fsq import FSQ
from pondera.methods.quantize.identity import Identity
from pondera.methods.quantize.lfq import LFQ
from pondera.methods.quantize.scalar import Scalar

LEVELS = [8, 5, 2, 3]


class TestFSQ:
    def grid(self) -> Tensor:
        """All combinations, the first coordinate running fastest."""
        values = [[(v - count // 2) / (count // 2) for v in range(count)] for count in LEVELS]
        return torch.tensor([combination[::-1] for combination in itertools.product(*values[::-1])])

    def bounded(self, x: Tensor) -> Tensor:
        columns = []
        for z, count in zip(x.unbind(-1), LEVELS, strict=True):
            reach, offset = torch.tensor((count - 1) * 1.001 / 2), torch.tensor(0.5 if count % 2 == 0 else 0.0)
            columns.append((torch.tanh(z + torch.atanh(offset / reach)) * reach - offset) / (count // 2))
        return torch.stack(columns, -1)

    def test_a_code_is_the_nearest_of_all_combinations_to_the_bounded_vector(self):
        quantizer, x = FSQ(LEVELS).build(4), 2 * torch.randn(500, 4)
        widths = torch.tensor(LEVELS) // 2
        nearest = torch.cdist(self.bounded(x) * widths, self.grid() * widths).argmin(-1)
        found = quantizer(x)
        assert torch.equal(found.codes.flatten(), nearest)
        assert torch.equal(found.out, self.grid()[nearest])

    def test_every_code_stands_for_a_vector_of_its_own_and_is_reached(self):
        quantizer = FSQ(LEVELS).build(4)
        codes = torch.arange(240).view(-1, 1, 1)
        assert quantizer.sizes.tolist() == [[240]] and torch.equal(quantizer.decode(codes), self.grid())
        assert torch.equal(quantizer.table()[0, 0], self.grid())
        ends = torch.linspace(-6, 6, 101)
        reached = [FSQ([count]).build(1).encode(ends[:, None]).unique().tolist() for count in LEVELS]
        assert reached == [list(range(count)) for count in LEVELS]

    def test_zero_stays_zero(self):
        assert torch.equal(FSQ([4, 5, 8]).build(3)(torch.zeros(3)).out, torch.zeros(3))

    def test_the_gradient_is_that_of_the_bounded_vector(self):
        x = torch.randn(6, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(FSQ(LEVELS).build(4)(x).out.sum(), x)
        (expected,) = torch.autograd.grad(self.bounded(x).sum(), x)
        torch.testing.assert_close(gradient, expected)

    def test_other_widths_go_through_linear_maps(self):
        quantizer, x = FSQ([5, 5]).build(7), torch.randn(20, 7)
        z = quantizer.enter(x)
        inner = FSQ([5, 5]).build(2)(z)
        found = quantizer(x)
        assert torch.equal(found.codes, inner.codes) and torch.equal(found.out, quantizer.leave(inner.out))
        found.out.square().sum().backward()
        assert all(weight.grad.any() for weight in quantizer.parameters())

    def test_large_codebooks_have_no_table(self):
        quantizer = FSQ([64] * 8).build(8)
        assert quantizer.table() is None and quantizer.bits == 48
        assert torch.equal(quantizer.decode(quantizer.encode(torch.ones(8))), quantizer(torch.ones(8)).out)
        with pytest.raises(UserError, match="FSQ has no table"):
            quantizer.soft_decode(torch.zeros(1, 1, 3))

    def test_usage_is_told(self):
        assert FSQ([3, 3]).build(2)(torch.tensor([[0.0, 0.0], [9.0, 9.0], [9.0, 9.0]])).health.usage == [[2 / 9]]

    @pytest.mark.parametrize("levels", [[], [8, 1], [8, 2.5], [True], [2] * 63])
    def test_bad_levels(self, levels: list):
        with pytest.raises(UserError, match="values or more per coordinate|more codes than"):
            FSQ(levels)


class TestLFQ:
    def corners(self, bits: int) -> Tensor:
        return torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in range(bits)] for code in range(2**bits)])

    def test_a_code_is_the_nearest_corner(self):
        quantizer, x = LFQ().build(5), torch.randn(200, 5)
        found = quantizer(x)
        assert torch.equal(found.codes.flatten(), torch.cdist(x, self.corners(5)).argmin(-1))
        assert torch.equal(found.out, self.corners(5)[found.codes.flatten()]) and quantizer.bits == 5
        torch.testing.assert_close(found.terms["commitment"].mean(), (x - found.out).square().mean())

    def test_the_entropy_is_that_over_all_codes(self):
        quantizer, x = LFQ(temperature=2.0).build(3), torch.randn(10, 3)
        p_NK = (-torch.cdist(x, self.corners(3)).square() / 2.0).softmax(-1)
        torch.testing.assert_close(quantizer(x).terms["entropy"].sum, torch.special.entr(p_NK).sum())

    def test_diversity_has_the_gradient_of_the_entropy_of_the_mean(self):
        quantizer, x = LFQ().build(3), torch.randn(40, 3, requires_grad=True)
        p_NC = (4 * x).sigmoid()
        quantizer.ones_C.copy_(p_NC.mean(0).detach())
        mean_C = p_NC.mean(0)
        negative = -(torch.special.entr(mean_C) + torch.special.entr(1 - mean_C)).mean()
        term = quantizer(x).terms["diversity"]
        torch.testing.assert_close(term.mean(), negative)
        (gradient,) = torch.autograd.grad(term.mean(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(negative, x)[0])

    def test_the_average_moves_between_steps(self):
        quantizer, x = LFQ(decay=0.5).build(2), torch.randn(12, 2) + 1
        quantizer.begin_step(0, 0)
        for part in x.split(5):
            quantizer(part)
            assert quantizer.ones_C.eq(0.5).all()
        quantizer.begin_step(1, 0)
        torch.testing.assert_close(quantizer.ones_C, 0.25 + 0.5 * (4 * x).sigmoid().mean(0))
        quantizer.begin_step(2, 0)
        torch.testing.assert_close(quantizer.ones_C, 0.25 + 0.5 * (4 * x).sigmoid().mean(0))

    @pytest.mark.parametrize(("entropy", "balanced"), [(1.0, True), (0.0, False)])
    def test_it_brings_one_sided_coordinates_back(self, entropy: float, balanced: bool):
        torch.manual_seed(0)
        quantizer, shift = LFQ(entropy=entropy, commitment=0.0).build(3), torch.full((3,), 0.8, requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=0.05)
        for step in range(150):
            quantizer.begin_step(step, 0)
            optimizer.zero_grad()
            quantizer(0.5 * torch.randn(64, 3) + shift).loss.backward()
            optimizer.step()
        share = (0.5 * torch.randn(2000, 3) + shift > 0).double().mean(0)
        assert bool(((share - 0.5).abs() < 0.2).all()) == balanced

    @pytest.mark.parametrize(
        "wrong",
        [{"bits": 0}, {"bits": 63}, {"temperature": 0.0}, {"decay": 1.0}, {"entropy": -1.0}, {"commitment": -1.0}],
    )
    def test_bad_arguments(self, wrong: dict):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            LFQ(**wrong)

    def test_too_wide_without_bits(self):
        with pytest.raises(UserError, match="64 bits does not fit.*bits=18"):
            LFQ().build(64)


class TestScalar:
    def test_every_dimension_gets_the_nearest_of_its_values(self):
        quantizer, x = Scalar([4, 3], low=[-1.0, 0.0], high=[1.0, 6.0]).build(2), 3 * torch.randn(300, 2)
        values = [torch.tensor([-0.75, -0.25, 0.25, 0.75]), torch.tensor([1.0, 3.0, 5.0])]
        found = quantizer(x)
        for dim in range(2):
            nearest = (x[:, dim, None] - values[dim]).abs().argmin(-1)
            assert torch.equal(found.codes[:, dim, 0], nearest)
            torch.testing.assert_close(found.out[:, dim], values[dim][nearest])
        assert quantizer.bits == 4 and quantizer.table().shape == (2, 1, 4, 1)
        assert quantizer.table()[1, 0, :, 0].tolist() == [1.0, 3.0, 5.0, 0.0]

    def test_ranges_are_those_of_all_that_was_seen_in_the_first_steps(self):
        quantizer = Scalar(8, spread=2.0, steps=3).build(4)
        x = torch.randn(90, 4) * torch.tensor([1.0, 5.0, 0.1, 1.0]) + 100
        mask = torch.rand(90) < 0.7
        for step, (part, kept) in enumerate(zip(x.split(30), mask.split(30), strict=True)):
            quantizer.begin_step(step, 0)
            for half, of_half in zip(part.split(11), kept.split(11), strict=True):
                quantizer(half, of_half)
        low_D, cell_D = quantizer.ranges()
        mean_D, std_D = x[mask].double().mean(0), x[mask].double().std(0, correction=0)
        torch.testing.assert_close(low_D.double(), mean_D - 2 * std_D, atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(8 * cell_D.double(), 4 * std_D, atol=1e-4, rtol=1e-4)
        quantizer.begin_step(3, 0)
        quantizer(10 * x)
        assert torch.equal(quantizer.ranges()[0], low_D)

    def test_where_nobody_says_when_a_step_begins_each_call_is_one(self):
        quantizer = Scalar(8, steps=2).build(1)
        seen = []
        for number in range(4):
            quantizer(torch.randn(50, 1) + number)
            seen.append(int(quantizer.num_seen))
        assert seen == [50, 100, 100, 100]

    @pytest.mark.parametrize(("levels", "spread"), [(2, 1.596), (4, 1.991), (8, 2.344), (16, 2.682), (32, 3.010)])
    def test_the_range_suits_normally_distributed_numbers(self, levels: int, spread: float):
        """Against the table of Max, Quantizing for minimum distortion (1960): half the levels times the step."""
        assert Scalar(levels).build(1).spread_D.item() == pytest.approx(spread, abs=0.03)

    def test_the_error_is_that_of_the_best_even_spacing(self):
        torch.manual_seed(0)
        quantizer, x = Scalar(8).build(3), torch.randn(40000, 3) * 4 - 2
        error = (quantizer(x).out - x).square().mean() / 16
        assert error.item() == pytest.approx(0.03744, rel=0.03)

    def test_a_dimension_that_never_changes(self):
        quantizer, x = Scalar(4).build(2), torch.stack([torch.full((9,), 3.0), torch.randn(9)], 1)
        found = quantizer(x)
        assert found.out.isfinite().all() and found.out[:, 0].sub(3).abs().max() < 1e-5

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"levels": 0}, "levels=0"),
            ({"levels": [4, 0]}, "levels="),
            ({"low": 1.0}, "both ends"),
            ({"spread": 0.0}, "spread="),
            ({"steps": 0}, "steps="),
        ],
    )
    def test_bad_arguments(self, wrong: dict, said: str):
        with pytest.raises(UserError, match=said):
            Scalar(**wrong)

    def test_what_does_not_fit_the_width(self):
        with pytest.raises(UserError, match="levels has 3 entries for vectors of width 2"):
            Scalar([4, 4, 4]).build(2)
        with pytest.raises(UserError, match="low must be below high"):
            Scalar(4, low=[0.0, 1.0], high=1.0).build(2)


class TestIdentity:
    def test_vectors_stay(self):
        quantizer, x = Identity().build(3), torch.randn(4, 3, requires_grad=True)
        found = quantizer(x)
        assert torch.equal(found.out, x) and found.codes.shape == (4, 0, 0) and not found.terms
        assert torch.autograd.grad(found.out.sum(), x)[0].eq(1).all()
        assert not quantizer.discrete and quantizer.bits == 0 == quantizer.nbytes(5) and quantizer.table() is None

    def test_there_is_nothing_to_decode(self):
        quantizer = Identity().build(3)
        with pytest.raises(UserError, match="nothing to decode"):
            quantizer.decode(quantizer.encode(torch.zeros(2, 3)))

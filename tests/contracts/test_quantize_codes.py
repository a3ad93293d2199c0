"""The contract tests of quantizers that concern codes: encoding, decoding, folding and packing.

Encoding and decoding agree with quantizing. Folded quantizers equal the original, and packing codes is invertible.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.quantizers import CASES, CODED, built, most, same, state, vectors
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.base import MERGES, Quantizer
from pondera.methods.quantize.common.packing import pack, unpack


@pytest.mark.parametrize("case", CODED)
def test_codes_are_found_and_stand_for_the_output(case: str):
    quantizer, x = built(case).eval(), vectors(4, 9)
    found = quantizer(x)
    codes = quantizer.encode(x)
    assert torch.equal(codes, found.codes)
    assert (codes >= 0).all() and (codes < quantizer.sizes).all()
    assert torch.equal(quantizer.decode(codes), found.out)
    assert len(codes.unique()) > 1 or most(quantizer) == 1


class TestSoftDecode:
    """Decoding of scores in place of codes, for quantizers with a table."""

    def tabled(self, case: str) -> Quantizer:
        """A quantizer with a table; for one without, tests that it refuses scores, and skips the rest."""
        quantizer = built(case).eval()
        if quantizer.table() is None:
            name = case.partition("(")[0]
            with pytest.raises(UserError, match=f"{name} has no table"):
                quantizer.soft_decode(torch.zeros(1, quantizer.groups, quantizer.levels, most(quantizer)))
            pytest.skip(f"{name} has no table; it refuses scores by name")
        return quantizer

    def one_hot(self, quantizer: Quantizer, codes: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(codes, most(quantizer)).float()

    @pytest.mark.parametrize("case", CODED)
    def test_one_hot_scores_are_the_codes(self, case: str):
        quantizer = self.tabled(case)
        codes = quantizer.encode(vectors(3, 4))
        scores, expected = self.one_hot(quantizer, codes), quantizer.decode(codes)
        for merge, logits in (("raw_logits", scores), ("softmax", 1e4 * scores), ("hard", scores)):
            torch.testing.assert_close(quantizer.soft_decode(logits, merge), expected)

    @pytest.mark.parametrize("case", CODED)
    def test_raw_scores_are_linear_and_all_but_hard_learn(self, case: str):
        quantizer = self.tabled(case)
        shape = (5, quantizer.groups, quantizer.levels, most(quantizer))
        a, b = (torch.randn(shape, requires_grad=True) for _ in range(2))

        def soft(logits: Tensor) -> Tensor:
            return quantizer.soft_decode(logits, "raw_logits")

        torch.testing.assert_close(soft(2 * a - 3 * b), 2 * soft(a) - 3 * soft(b), atol=1e-3, rtol=1e-4)
        for merge in MERGES:
            out = quantizer.soft_decode(a, merge)
            gradient = torch.autograd.grad(out.square().sum(), a, allow_unused=True)[0] if out.requires_grad else None
            assert (gradient is not None and bool(gradient.any())) == (merge != "hard" and shape[-1] > 1) or (
                merge == "raw_logits"
            )

    @pytest.mark.parametrize("case", CODED)
    def test_scores_of_codes_that_are_not_there_count_for_nothing(self, case: str):
        quantizer = self.tabled(case)
        sizes, codes = quantizer.sizes, torch.arange(most(quantizer))
        logits = torch.randn(2, *sizes.shape, len(codes))
        loud = torch.where(codes < sizes[..., None], logits, 50.0)
        for merge in MERGES:
            assert torch.equal(quantizer.soft_decode(logits, merge), quantizer.soft_decode(loud, merge))

    def test_errors_say_what_to_write(self):
        with pytest.raises(UserError, match="did you mean 'softmax'"):
            built("VQ(5)").soft_decode(torch.zeros(1, 1, 1, 5), "sotfmax")
        with pytest.raises(UserError, match="Identity has no table"):
            built("Identity()").soft_decode(torch.zeros(1, 0, 0, 5))


class TestFold:
    """Folding replaces trained parameters by plain tables."""

    @pytest.mark.parametrize("case", CASES)
    def test_it_is_exact_and_learns_nothing(self, case: str):
        quantizer = built(case).eval()
        before = state(quantizer)
        folded, x = quantizer.fold(), vectors(6, 3, seed=9)
        codes = quantizer.encode(x)
        assert torch.equal(folded.encode(x), codes) and torch.equal(folded(x).out, quantizer(x).out)
        if folded.discrete and codes.numel():
            for levels in range(quantizer.levels + 1):
                assert torch.equal(folded.decode(codes[..., :levels]), quantizer.decode(codes[..., :levels]))
        assert torch.equal(folded.sizes, quantizer.sizes) and folded.bits == quantizer.bits
        assert not any(weight.requires_grad for weight in folded.parameters())
        same(before, state(quantizer))

    @pytest.mark.parametrize("case", CASES)
    def test_training_does_not_change_it(self, case: str):
        quantizer = built(case)
        folded = quantizer.fold().train()
        codes, before = folded.encode(vectors(9)), state(folded)
        for step in range(3, 6):
            for one in (folded, quantizer):
                one.begin_step(step, 0)
                one(vectors(64, seed=step) + 5)
        assert torch.equal(folded.encode(vectors(9)), codes)
        moved = [name for name, value in state(folded).items() if not torch.equal(value, before[name])]
        assert all(name.rpartition(".")[2] == "step" for name in moved)


@pytest.mark.parametrize("case", CODED)
def test_packed_codes_take_the_bytes_it_says(case: str):
    quantizer = built(case).eval()
    for number in (0, 1, 13):
        codes = quantizer.encode(vectors(number))
        data = pack(codes, quantizer.sizes)
        bits = sum(math.ceil(math.log2(size)) for size in quantizer.sizes.flatten().tolist())
        assert quantizer.bits == bits
        assert data.dtype == torch.uint8 and len(data) == quantizer.nbytes(number) == math.ceil(number * bits / 8)
        assert torch.equal(unpack(data, number, quantizer.sizes), codes)

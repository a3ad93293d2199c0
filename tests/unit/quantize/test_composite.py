"""Decoding by one look-up against decoding part by part."""

from __future__ import annotations

import pytest
import torch

from pondera.methods.quantize.base import ABSENT
from pondera.methods.quantize.common.composite import Composite
from pondera.methods.quantize.product import Product
from pondera.methods.quantize.residual import Residual
from pondera.methods.quantize.sim_vq import SimVQ
from pondera.methods.quantize.vq import VQ

NESTED = Residual(Residual(VQ(5), levels=2), levels=2)  # sums of sums: no look-up adds in that order
CASES = [
    Product(VQ(5), groups=3, order=[4, 0, 3, 5, 2, 1]),
    Residual(VQ(5), levels=4),
    Product(Residual(SimVQ(5), levels=2), groups=2),
    Residual(Product(VQ(5), groups=3, order=[4, 0, 3, 5, 2, 1]), levels=2),
    NESTED,
]


def made(description: Composite, seed: int = 0) -> Composite:
    torch.manual_seed(seed)
    return description.build(6)


def some_codes(quantizer: Composite) -> torch.Tensor:
    return torch.randint(ABSENT, 5, (7, 3, quantizer.groups, quantizer.levels))


@pytest.mark.parametrize("description", CASES, ids=repr)
def test_one_look_up_is_the_loop_over_parts(description: Composite):
    folded = made(description).fold()
    codes = some_codes(folded)
    for levels in range(1, folded.levels + 1):
        assert torch.equal(folded.decode(codes[..., :levels]), folded._decode_by_parts(codes[..., :levels]))
    assert (folded._lookup is None) == (description is NESTED)
    assert folded.decode(codes[:0]).shape == (0, 3, 6)


@pytest.mark.parametrize("description", CASES, ids=repr)
def test_it_follows_its_tables(description: Composite):
    folded, other = made(description).fold(), made(description, seed=1).fold()
    codes = some_codes(folded)
    folded.decode(codes)
    folded.load_state_dict(other.state_dict())
    assert torch.equal(folded.decode(codes), other._decode_by_parts(codes))
    assert folded.double().decode(codes).dtype == torch.float64
    assert torch.equal(folded.decode(codes), other.double()._decode_by_parts(codes))


def test_what_learns_still_gets_gradient():
    quantizer = made(Residual(VQ(5), levels=2))
    with torch.no_grad():
        quantizer.decode(some_codes(quantizer))
    quantizer.decode(some_codes(quantizer)).sum().backward()
    assert all(weight.grad is not None for weight in quantizer.parameters())


@pytest.mark.parametrize("description", CASES, ids=repr)
def test_codes_that_do_not_exist(description: Composite):
    folded = made(description).fold()
    codes = some_codes(folded)
    codes[0, 0, 0, 0] = 5
    with pytest.raises((IndexError, RuntimeError)):
        folded.decode(codes)
    with pytest.raises((ValueError, RuntimeError)):
        folded.decode(torch.cat([codes] * 2, -2))

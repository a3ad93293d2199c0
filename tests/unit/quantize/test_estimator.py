"""Gradient estimators: values to the bit, Jacobians against the matrices that they should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera import UserError
from pondera.methods.quantize.common.estimator import ESTIMATORS, estimate

WIDTHS = [1, 2, 5]


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, q = (torch.randn(*shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return x, 3 * q


def jacobian(name: str, x: Tensor, q: Tensor) -> Tensor:
    """``[C, C]`` of the output by one vector x."""
    return torch.autograd.functional.jacobian(lambda x: estimate(name, x, q), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (4,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_are_those_of_q_to_the_bit(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    x, q = (vector.to(dtype) for vector in pair(*shape))
    assert torch.equal(estimate(name, 1e3 * x, q), q)


@pytest.mark.parametrize("C", WIDTHS)
def test_straight_through_is_the_identity(C: int):
    assert torch.equal(jacobian("straight_through", *pair(C)), torch.eye(C, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("C", WIDTHS)
def test_the_rotation_is_one_up_to_the_ratio_of_norms(C: int, seed: int):
    """Orthogonal, takes x to q, leaves alone what is orthogonal to both, and is no reflection."""
    x, q = pair(C, seed=seed)
    found, ratio = jacobian("rotation", x, q), q.norm() / x.norm()
    eye = torch.eye(C, dtype=torch.float64)
    torch.testing.assert_close(found.T @ found, ratio**2 * eye)
    torch.testing.assert_close(found @ x, q)
    if C > 1:
        torch.testing.assert_close(torch.linalg.det(found), ratio**C)
        plane = torch.stack([x, q])
        others = torch.linalg.svd(plane)[2][2:]
        torch.testing.assert_close(others @ found.T, ratio * others)


@pytest.mark.parametrize("C", WIDTHS)
def test_rotation_where_there_is_none(C: int):
    x, q = pair(C)
    torch.testing.assert_close(jacobian("rotation", x, x), torch.eye(C, dtype=torch.float64))
    opposite = jacobian("rotation", x, -2 * x)
    torch.testing.assert_close(opposite.T @ opposite, 4 * torch.eye(C, dtype=torch.float64))
    torch.testing.assert_close(opposite @ x, -2 * x)
    assert torch.equal(jacobian("rotation", torch.zeros_like(x), q), torch.eye(C, dtype=torch.float64))
    assert jacobian("rotation", x, torch.zeros_like(q)).abs().max() == 0


def test_vectors_of_a_batch_are_turned_one_by_one():
    x, q = pair(4, 3)
    g = torch.randn_like(x)
    whole = x.clone().requires_grad_()
    (estimate("rotation", whole, q) * g).sum().backward()
    alone = torch.stack([jacobian("rotation", *each).T @ turned for *each, turned in zip(x, q, g, strict=True)])
    torch.testing.assert_close(whole.grad, alone)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_q_gets_gradient_where_x_gets_none(name: str):
    x, q = (vector.requires_grad_() for vector in pair(4, 3))
    estimate(name, x, q).sum().backward()
    assert (x.grad is None) == (name == "none") and (q.grad is None) == (name != "none")


def test_an_unknown_estimator():
    with pytest.raises(UserError, match="did you mean 'rotation'"):
        estimate("rotate", *pair(2))

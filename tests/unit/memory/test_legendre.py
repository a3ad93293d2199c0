"""Legendre coefficients, written block by block, hold exactly what a projection of the whole signal does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pondera.methods.memory.common import legendre


def signal(tokens: int, width: int = 3) -> Tensor:
    return torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def in_blocks(u_TD: Tensor, blocks: list[int], order: int) -> Tensor:
    """Coefficients after blocks of any lengths."""
    c_ND, seen = u_TD.new_zeros(order, u_TD.shape[1]), 0
    for block in blocks:
        stretch, entry = legendre.stretch(seen / (seen + block), order), legendre.entry(seen, block, order)
        c_ND = stretch.to(u_TD) @ c_ND + entry.to(u_TD) @ u_TD[seen : seen + block]
        seen += block
    assert seen == len(u_TD)
    return c_ND


def projected(u_TD: Tensor, order: int) -> Tensor:
    """The definition: the mean over time of signal times basis, by quadrature within each token."""
    tokens = len(u_TD)
    x, weight = legendre.nodes(order // 2 + 1)
    time_Tq = (torch.arange(tokens)[:, None] + x) / tokens
    return torch.einsum("tqn,q,td->nd", legendre.basis(time_Tq, order), weight, u_TD) / tokens


@pytest.mark.parametrize("order", [1, 2, 16, 64])
def test_block_updates_equal_token_steps_and_one_projection(order: int):
    u = signal(300)
    wanted = projected(u, order)
    for blocks in ([300], [1] * 300, [32] * 9 + [12], [1, 7, 64, 100, 128]):
        torch.testing.assert_close(in_blocks(u, blocks, order), wanted, atol=1e-10, rtol=1e-10)


def test_in_float32_it_is_as_good_as_float32():
    u = signal(4096, 1)
    wanted = projected(u, 128)
    assert (in_blocks(u.float(), [64] * 64, 128) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.99])
def test_a_stretch_is_the_matrix_exponential_and_a_contraction(ratio: float):
    order = 48
    n = torch.arange(order, dtype=torch.float64)
    generator = -((2 * n + 1).sqrt()[:, None] * (2 * n + 1).sqrt()).tril(-1) - torch.diag(n + 1)
    stretch = legendre.stretch(ratio, order)
    if ratio:
        wanted = torch.linalg.matrix_exp(generator * math.log(1 / ratio))
        torch.testing.assert_close(stretch, wanted, atol=1e-11, rtol=0)
    assert torch.equal(stretch, stretch.tril())
    assert float(torch.linalg.matrix_norm(stretch, 2)) == pytest.approx(ratio**0.5, abs=1e-11)
    both = stretch @ legendre.stretch(0.7, order)
    torch.testing.assert_close(both, legendre.stretch(0.7 * ratio, order), atol=1e-11, rtol=0)


def test_orders_of_hundreds_stay_exact():
    both = legendre.stretch(0.99, 512) @ legendre.stretch(0.9, 512)
    torch.testing.assert_close(both, legendre.stretch(0.891, 512), atol=1e-10, rtol=0)


def test_a_constant_is_the_first_coefficient_at_all_times():
    for blocks in ([5], [5, 1, 30], [64] * 5):
        c = in_blocks(torch.ones(sum(blocks), 1, dtype=torch.float64), blocks, 20)
        torch.testing.assert_close(c[:, 0], torch.eye(20, dtype=torch.float64)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [100, 1000])
def test_polynomials_of_time_are_read_back(tokens: int):
    def polynomial(x: Tensor) -> Tensor:
        return 1 - 3 * x + 2 * x**3

    c = in_blocks(polynomial((torch.arange(tokens).double() + 0.5) / tokens)[:, None], [tokens // 10] * 10, 6)
    points = torch.linspace(0, 1, 33, dtype=torch.float64)
    error = (legendre.basis(points, 6) @ c)[:, 0] - polynomial(points)
    assert error.abs().max() < 2 / tokens


def test_reading_at_gauss_points_keeps_lengths():
    points, weight = legendre.nodes(40)
    read = legendre.basis(points, 40)
    torch.testing.assert_close(read.T @ (weight[:, None] * read), torch.eye(40).double(), atol=1e-12, rtol=0)


def test_windows_take_blocks_as_they_take_tokens():
    u, order, theta = signal(120), 24, 37.5
    step, entry = legendre.window(theta, 1, order)
    c = torch.zeros(order, 3, dtype=torch.float64)
    for row in u:
        c = step @ c + entry @ row[None]
    block_step, block_entry = legendre.window(theta, 40, order)
    d = torch.zeros_like(c)
    for part in u.split(40):
        d = block_step @ d + block_entry @ part
    torch.testing.assert_close(d, c, atol=1e-12, rtol=0)


def test_a_window_shows_its_last_tokens():
    time = torch.arange(400).double()
    step, entry = legendre.window(80.0, 20, 32)
    c = torch.zeros(32, 1, dtype=torch.float64)
    for part in torch.sin(time / 15)[:, None].split(20):
        c = step @ c + entry @ part
    points = torch.tensor([0.1, 0.4, 0.9])
    read = (legendre.basis(points, 32) @ c)[:, 0]
    wanted = torch.sin((400 - 80 + 80 * points - 0.5) / 15).double()
    torch.testing.assert_close(read, wanted, atol=0.01, rtol=0)

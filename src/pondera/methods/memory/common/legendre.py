"""Legendre coefficients of signals: exact block-wise updates, and evaluation at any point.

A signal of time, constant over each token, is represented by its projection on the first N Legendre polynomials. There
are two measures: all past tokens with equal weight (LegS), or a window of the last theta tokens (LegT). Both updates
are linear, so the coefficients after a block are ``P c + W u``, with one matrix for the old coefficients and one for
the values of the block.

Time runs from 0 (oldest covered time) to 1 (now). The basis is orthonormal there: ``g_n(x) = sqrt(2n+1) P_n(2x-1)``.

Source: HiPPO, arXiv 2008.07669 (its equations in continuous time). This implementation does not discretize the
equations: for a piecewise constant signal the update for a block has a closed form. The common bilinear discretization
has an error of half of the state at N = 64 on noise.

All computations are float64; callers round the results once, to the dtype of their products.

Shapes: N order (number of coefficients), b tokens of a block, S points.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def polynomials(x: Tensor, order: int) -> Tensor:
    """The Legendre polynomials ``P_0, ..., P_{N-1}`` on [-1, 1], by their three-term recurrence.

    Args:
        x: any shape.
        order: N.

    Returns:
        ``[..., N]``, float64.
    """
    x = x.double()
    values = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:order], dim=-1)


def basis(x: Tensor, order: int) -> Tensor:
    """``g_n(x)``, orthonormal on [0, 1]; as a matrix, it evaluates coefficients at points `x`.

    Args:
        x: in [0, 1], ``[...]``. At the ends ``|g_n| = sqrt(2n+1)``, so interior points have less noise.
        order: N.

    Returns:
        ``[..., N]``, float64.

    Example:
        >>> basis(torch.tensor([0.5, 1.0]), 3).round(decimals=3).tolist()
        [[1.0, 0.0, -1.118], [1.0, 1.732, 2.236]]
    """
    return polynomials(2 * x.double() - 1, order) * _norms(order)


def integrals(x: Tensor, order: int) -> Tensor:
    """The integral of ``g_n`` from 0 to x, ``[..., N]``, from ``(2n+1) P_n = (P_{n+1} - P_{n-1})'``."""
    p = polynomials(2 * x.double() - 1, order + 1)
    n = torch.arange(1, order, dtype=torch.float64)
    above = (p[..., 2:] - p[..., :-2]) / (2 * n + 1)
    first = p[..., 1:2] + 1
    return torch.cat([first, above], dim=-1) / 2 * _norms(order)


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes in (0, 1) and weights, exact for polynomials of degree below twice their count."""
    x, weight = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(weight / 2)


def stretch(ratio: float, order: int) -> Tensor:
    """P of LegS: maps the coefficients of a history to those of a longer history whose new part is zero.

    The matrix is lower triangular and a contraction (its spectral norm is the square root of `ratio`), and
    ``stretch(a) @ stretch(b)`` is ``stretch(a * b)``. It equals ``expm(A log(1 / ratio))``, with the matrix A of the
    HiPPO equations.

    Args:
        ratio: old length divided by new length; 0: no history.
        order: N.

    Returns:
        ``[N, N]``, float64.
    """
    x, weight = nodes(order + 1)
    return (ratio * basis(ratio * x, order).T @ (weight[:, None] * basis(x, order))).tril()


def entry(seen: int, block: int, order: int) -> Tensor:
    """W of LegS: the contribution of each of the next `block` tokens to the coefficients of the extended history.

    Args:
        seen: number of earlier tokens.
        block: b.
        order: N.

    Returns:
        ``[N, b]``, float64.
    """
    edge = torch.arange(seen, seen + block + 1, dtype=torch.float64) / (seen + block)
    return integrals(edge, order).diff(dim=0).T.contiguous()


def window(theta: float, block: int, order: int) -> tuple[Tensor, Tensor]:
    """P and W of LegT, for blocks of `block` tokens: a window of the last `theta` tokens.

    The result is exact for the LegT equation. The equation itself only approximates the window, because it uses its own
    reconstruction of the values that leave the window.

    Args:
        theta: window length in tokens.
        block: b.
        order: N.

    Returns:
        ``[N, N]`` and ``[N, b]``, float64.
    """
    n = torch.arange(order)
    sign = torch.where(n[None] <= n[:, None], 1.0, (-1.0) ** (n[:, None] - n[None]).abs())
    root = _norms(order)
    a = -root[:, None] * sign.double() * root[None]
    step = torch.linalg.matrix_exp(a / theta)
    enters = torch.linalg.solve(a, (step - torch.eye(order, dtype=torch.float64)) @ root)
    columns = [enters]
    for _ in range(block - 1):
        columns.append(step @ columns[-1])
    return torch.linalg.matrix_power(step, block), torch.stack(columns[::-1], dim=1)


def _norms(order: int) -> Tensor:
    return torch.tensor([math.sqrt(2 * n + 1) for n in range(order)], dtype=torch.float64)

"""Signals as Legendre coefficients that are written block by block, without error, and read at any point.

A signal of time, constant over each token, is kept as its projection on the first N Legendre polynomials. Two measures of
what is to be approximated: all that was read, evenly (LegS), or a window of the last theta tokens (LegT). Both are linear,
so the coefficients after a block are ``P c + W u``: a matrix on those before and one on the block's own values.

Time runs from 0 (the oldest that is covered) to 1 (now). The basis is orthonormal there: ``g_n(x) = sqrt(2n+1) P_n(2x-1)``.

Source: HiPPO, arXiv 2008.07669 (its equations in continuous time). What is computed here is not a discretisation of them:
for a piecewise constant signal the block's step has a closed form, and that is it. A bilinear step, as often used, is off
by half of the state at N = 64 on noise.

Everything is float64: the callers round once, to what they multiply with.

Shapes: N order (number of coefficients), b tokens of a block, S points.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def polynomials(x: Tensor, order: int) -> Tensor:
    """The Legendre polynomials ``P_0, ..., P_{N-1}`` on [-1, 1], by their recurrence.

    Args:
        x: any shape.
        order: N.

    Returns:
        ``[..., N]``, float64.
    """
    x = x.double()
    found = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        found.append(((2 * n + 1) * x * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found[:order], dim=-1)


def basis(x: Tensor, order: int) -> Tensor:
    """``g_n(x)``, orthonormal on [0, 1]; the rows that read coefficients at points `x`.

    Args:
        x: in [0, 1], ``[...]``. At its ends ``|g_n| = sqrt(2n+1)``, so points inside are read with less noise.
        order: N.

    Returns:
        ``[..., N]``, float64.

    Example:
        >>> basis(torch.tensor([0.5, 1.0]), 3).round(decimals=3).tolist()
        [[1.0, 0.0, -1.118], [1.0, 1.732, 2.236]]
    """
    return polynomials(2 * x.double() - 1, order) * _norms(order)


def integrals(x: Tensor, order: int) -> Tensor:
    """``integral of g_n from 0 to x``, as ``P_n`` is the derivative of ``(P_{n+1} - P_{n-1}) / (2n+1)``; ``[..., N]``."""
    p = polynomials(2 * x.double() - 1, order + 1)
    n = torch.arange(1, order, dtype=torch.float64)
    above = (p[..., 2:] - p[..., :-2]) / (2 * n + 1)
    first = p[..., 1:2] + 1
    return torch.cat([first, above], dim=-1) / 2 * _norms(order)


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points in (0, 1) and their weights, exact for polynomials of degree below twice their count."""
    x, weight = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(weight / 2)


def stretch(ratio: float, order: int) -> Tensor:
    """P of LegS: the coefficients of a history that becomes the first `ratio` of a longer one, nothing yet known of the rest.

    Lower triangular, a contraction (its spectral norm is the root of `ratio`), and ``stretch(a) @ stretch(b)`` is
    ``stretch(a * b)``. It equals ``expm(A log(1 / ratio))``, with the matrix A of the HiPPO equations.

    Args:
        ratio: old length over new length; 0: there was no history.
        order: N.

    Returns:
        ``[N, N]``, float64.
    """
    x, weight = nodes(order + 1)
    return (ratio * basis(ratio * x, order).T @ (weight[:, None] * basis(x, order))).tril()


def entry(seen: int, block: int, order: int) -> Tensor:
    """W of LegS: what each of the next `block` tokens adds to the coefficients of all that will then have been read.

    Args:
        seen: tokens before them.
        block: b.
        order: N.

    Returns:
        ``[N, b]``, float64.
    """
    edge = torch.arange(seen, seen + block + 1, dtype=torch.float64) / (seen + block)
    return integrals(edge, order).diff(dim=0).T.contiguous()


def window(theta: float, block: int, order: int) -> tuple[Tensor, Tensor]:
    """P and W of LegT, for blocks of `block` tokens: a window of the last `theta` tokens.

    Exact for the LegT equation, which itself only approximates the window: what leaves it is known by its own
    reconstruction alone.

    Args:
        theta: tokens that the window covers.
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

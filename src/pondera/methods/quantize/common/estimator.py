"""Gradient estimators: what gradient the input of a quantizer gets for that of its output.

Shapes: C width; ``...`` are any leading dimensions. Every estimator returns exactly the values of q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pondera.core.errors import unknown


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """q, with the gradient of the identity to x and none to q.

    Args:
        x: ``[..., C]``, what was quantized.
        q: ``[..., C]``, what it became.

    Source: Bengio et al., arXiv 1308.3432; van den Oord et al., arXiv 1711.00937, section 3.2.

    Example:
        >>> x = torch.tensor([0.4, -0.3], requires_grad=True)
        >>> straight_through(x, torch.tensor([1.0, 0.0])).square().sum().backward()
        >>> x.grad
        tensor([2., 0.])
    """
    return _Straight.apply(q.detach(), x)


def rotate(x: Tensor, q: Tensor) -> Tensor:
    """q, with the gradient of the rotation and scaling that takes x to q, both held constant; none to q.

    Vectors of one cell get different gradients: what points along q reaches x along x, so angles between gradient and
    vector are kept.

    Args:
        x: ``[..., C]``, what was quantized.
        q: ``[..., C]``, what it became.

    Source: Fifty et al., the rotation trick, arXiv 2410.06424, section 4.2: ``q = (|q|/|x|) (I - 2 r r' + 2 q^ x^') x``
    with unit vectors ``x^``, ``q^`` and ``r = (x^ + q^) / |x^ + q^|``.
    Cost: a few products of width C per vector; no matrix is built.
    When not to use it: where nothing before the quantizer learns; it changes that gradient alone.
    Resolved: where x is zero there is no direction to turn, so its gradient is that of straight-through. Opposite x and q
    span no plane; r is then zero and what is left is the reflection that takes one to the other.

    Example:
        >>> x = torch.tensor([2.0, 0.0], requires_grad=True)
        >>> (rotate(x, torch.tensor([0.0, 1.0])) * torch.tensor([0.0, 3.0])).sum().backward()  # 3 along q
        >>> torch.allclose(x.grad, torch.tensor([1.5, 0.0]), atol=1e-6)  # 3 |q| / |x| along x
        True
    """
    return _Turned.apply(q.detach(), x)


def stop(x: Tensor, q: Tensor) -> Tensor:
    """q itself: no gradient to x; what reads the output teaches the codebook.

    Args:
        x: ``[..., C]``; not read.
        q: ``[..., C]``.
    """
    return q


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotate,
    "none": stop,
}


def estimate(name: str, x: Tensor, q: Tensor) -> Tensor:
    """q with the gradient of the estimator of this name.

    Raises:
        UserError: there is none.
    """
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return ESTIMATORS[name](x, q)


class _Straight(torch.autograd.Function):
    """To the bit the values of one tensor, with the gradient of the other. Nothing is computed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Turned(_Straight):
    """The same, but the gradient turned and scaled as by the rotation from x to q; all of its cost is in the backward pass."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        q, x = (vector.detach() for vector in ctx.saved_tensors)
        x_norm, q_norm = (vector.norm(dim=-1, keepdim=True) for vector in (x, q))
        tiny = torch.finfo(x.dtype).tiny
        from_, to = x / x_norm.clamp(min=tiny), q / q_norm.clamp(min=tiny)
        between = from_ + to
        between = between / between.norm(dim=-1, keepdim=True).clamp(min=tiny)
        # The transpose of (I - 2 r r' + 2 q^ x^').
        turned = gradient - 2 * _dot(between, gradient) * between + 2 * _dot(to, gradient) * from_
        scale = torch.where(x_norm > 0, q_norm / x_norm.clamp(min=tiny), 0)  # else 0 * inf
        return None, torch.where(x_norm > 0, turned * scale, gradient)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)

"""Gradient estimators: the gradient that a quantizer's input gets from its output.

Shapes: C width; ``...`` are any leading dimensions. Every estimator returns exactly the values of q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pondera.core.errors import unknown


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """Returns q; x gets the gradient of the identity, q gets none.

    Args:
        x: ``[..., C]``, the vectors.
        q: ``[..., C]``, the quantized vectors.

    Source: Bengio et al., arXiv 1308.3432; van den Oord et al., arXiv 1711.00937, section 3.2.

    Example:
        >>> x = torch.tensor([0.4, -0.3], requires_grad=True)
        >>> straight_through(x, torch.tensor([1.0, 0.0])).square().sum().backward()
        >>> x.grad
        tensor([2., 0.])
    """
    return _Straight.apply(q.detach(), x)


def rotate(x: Tensor, q: Tensor) -> Tensor:
    """Returns q; x gets the gradient of the constant rotation and scaling that maps x to q, q gets none.

    Vectors of one cell get different gradients: a gradient along q becomes a gradient along x, so the angle between
    gradient and vector is preserved.

    Args:
        x: ``[..., C]``, the vectors.
        q: ``[..., C]``, the quantized vectors.

    Source: Fifty et al., the rotation trick, arXiv 2410.06424, section 4.2: ``q = (|q|/|x|) (I - 2 r r' + 2 q^ x^') x``
    with unit vectors ``x^``, ``q^`` and ``r = (x^ + q^) / |x^ + q^|``.
    Cost: a few products of width C per vector; no matrix is formed.
    When not to use it: if nothing before the quantizer trains, because only that gradient changes.
    Resolved: a zero vector has no direction, so its gradient is straight-through. Opposite x and q span no plane; r is
    then zero, and the remaining map is the reflection of x to q.

    Example:
        >>> x = torch.tensor([2.0, 0.0], requires_grad=True)
        >>> (rotate(x, torch.tensor([0.0, 1.0])) * torch.tensor([0.0, 3.0])).sum().backward()  # 3 along q
        >>> torch.allclose(x.grad, torch.tensor([1.5, 0.0]), atol=1e-6)  # 3 |q| / |x| along x
        True
    """
    return _Turned.apply(q.detach(), x)


def stop(x: Tensor, q: Tensor) -> Tensor:
    """Returns q; x gets no gradient, and the loss on the output trains the codebook.

    Args:
        x: ``[..., C]``; ignored.
        q: ``[..., C]``.
    """
    return q


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotate,
    "none": stop,
}


def estimate(name: str, x: Tensor, q: Tensor) -> Tensor:
    """Returns q with the gradient of the named estimator.

    Raises:
        UserError: unknown name.
    """
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return ESTIMATORS[name](x, q)


class _Straight(torch.autograd.Function):
    """Returns the exact values of one tensor with the gradient of another, without arithmetic."""

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
    """As above, but rotates and scales the gradient as from x to q; all of the cost is in the backward pass."""

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
        scale = torch.where(x_norm > 0, q_norm / x_norm.clamp(min=tiny), 0)  # avoids 0 * inf
        return None, torch.where(x_norm > 0, turned * scale, gradient)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)

"""Gradient estimators: what gradient the input of a quantizer gets for that of its output.

Shapes: C width; ``...`` are any leading dimensions. Every estimator returns exactly the values of q.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pondera.ground.errors import unknown


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
    return _valued(q, x)


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
    x_norm, q_norm = (vector.detach().norm(dim=-1, keepdim=True) for vector in (x, q))
    tiny = torch.finfo(x.dtype).tiny
    from_, to = x.detach() / x_norm.clamp(min=tiny), q.detach() / q_norm.clamp(min=tiny)
    between = from_ + to
    between = between / between.norm(dim=-1, keepdim=True).clamp(min=tiny)
    turned = x - 2 * _dot(between, x) * between + 2 * _dot(from_, x) * to
    scale = torch.where(x_norm > 0, q_norm / x_norm.clamp(min=tiny), 0)  # else 0 * inf in the backward pass
    return _valued(q, torch.where(x_norm > 0, turned * scale, x))


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


def _valued(value: Tensor, path: Tensor) -> Tensor:
    """To the bit the values of one, with the gradient of the other."""
    return value.detach() + (path - path.detach())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)

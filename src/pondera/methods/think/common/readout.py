"""Readout: the state used for the prediction, when a token has one state per pass.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor


def mixture(states: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Weighted sum of states ``[B, T, D]`` with weights ``[B, T]``.

    Example:
        >>> import torch
        >>> mixture([torch.ones(1, 1, 2), 3 * torch.ones(1, 1, 2)], [torch.tensor([[0.5]]), torch.tensor([[0.5]])])
        tensor([[[2., 2.]]])
    """
    total = states[0] * weights[0][..., None].to(states[0].dtype)
    for state, weight in zip(states[1:], weights[1:], strict=True):
        total = total + state * weight[..., None].to(state.dtype)
    return total

"""Rotary position embedding and its inverse.

Shapes: B batch, H heads, S KV slots, d head width, r rotated coordinates (all of d, or the first of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of some positions, applied to queries and keys.

    Args:
        cos_BSr, sin_BSr: outputs of the rotary embedding of the backbone, including its scale; batch may be 1.

    Example:
        >>> rotary = Rotary(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        >>> rotary.apply(torch.tensor([[[[3.0, 4.0]]]])).tolist(), rotary.undo(torch.tensor([[[[-4.0, 3.0]]]])).tolist()
        ([[[[-4.0, 3.0]]]], [[[[3.0, 4.0]]]])
    """

    cos_BSr: Tensor
    sin_BSr: Tensor

    def apply(self, x_BHSd: Tensor) -> Tensor:
        """Rotates vectors by their positions."""
        cos, sin = self._wide(x_BHSd)
        return _turned(x_BHSd, cos, sin)

    def undo(self, x_BHSd: Tensor) -> Tensor:
        """Inverse of `apply`, exact for the given cosines and sines, also if they are rounded or scaled."""
        cos, sin = self._wide(x_BHSd)
        scale = cos.square() + sin.square()
        return _turned(x_BHSd, cos / scale, -sin / scale)

    def _wide(self, x_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(x_BHSd.dtype, torch.float32)
        return self.cos_BSr[:, None].to(kind), self.sin_BSr[:, None].to(kind)


def _turned(x_BHSd: Tensor, cos_B1Sr: Tensor, sin_B1Sr: Tensor) -> Tensor:
    """Rotates pairs of coordinates that are half the rotated width apart."""
    rotated = cos_B1Sr.shape[-1]
    x, rest = x_BHSd[..., :rotated].to(cos_B1Sr.dtype), x_BHSd[..., rotated:]
    first, second = x.chunk(2, dim=-1)
    turned = x * cos_B1Sr + torch.cat([-second, first], dim=-1) * sin_B1Sr
    return torch.cat([turned.to(x_BHSd.dtype), rest], dim=-1) if rest.shape[-1] else turned.to(x_BHSd.dtype)

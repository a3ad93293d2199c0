"""Rotary positions applied and taken back, as the backbone's layers apply them.

Shapes: B batch, H heads, S rows, d head width, r rotated coordinates (all of d, or the first of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """What queries and keys at some positions are turned by.

    Args:
        cos_BSr, sin_BSr: as the backbone's rotary embedding gives them, scaled if it scales; batch may be 1.

    Example:
        >>> turn = Rotary(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        >>> turn.apply(torch.tensor([[[[3.0, 4.0]]]])).tolist(), turn.undo(torch.tensor([[[[-4.0, 3.0]]]])).tolist()
        ([[[[-4.0, 3.0]]]], [[[[3.0, 4.0]]]])
    """

    cos_BSr: Tensor
    sin_BSr: Tensor

    def apply(self, x_BHSd: Tensor) -> Tensor:
        """Vectors without positions, turned."""
        cos, sin = self._wide(x_BHSd)
        return _turned(x_BHSd, cos, sin)

    def undo(self, x_BHSd: Tensor) -> Tensor:
        """Turned vectors, as they were before: the inverse of these very numbers, however they were rounded or scaled."""
        cos, sin = self._wide(x_BHSd)
        scale = cos.square() + sin.square()
        return _turned(x_BHSd, cos / scale, -sin / scale)

    def _wide(self, x_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(x_BHSd.dtype, torch.float32)
        return self.cos_BSr[:, None].to(kind), self.sin_BSr[:, None].to(kind)


def _turned(x_BHSd: Tensor, cos_B1Sr: Tensor, sin_B1Sr: Tensor) -> Tensor:
    """Pairs of coordinates half the rotated width apart, each turned in its plane."""
    rotated = cos_B1Sr.shape[-1]
    x, rest = x_BHSd[..., :rotated].to(cos_B1Sr.dtype), x_BHSd[..., rotated:]
    first, second = x.chunk(2, dim=-1)
    turned = x * cos_B1Sr + torch.cat([-second, first], dim=-1) * sin_B1Sr
    return torch.cat([turned.to(x_BHSd.dtype), rest], dim=-1) if rest.shape[-1] else turned.to(x_BHSd.dtype)

"""Identity: no quantization. ``...`` are any leading dimensions, D the width of vectors."""

from __future__ import annotations

import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.base import Quantized, Quantizer


class Identity(Quantizer):
    """Passes vectors through unquantized, for models with continuous units.

    Source: none; xAR (arXiv 2502.20388) and MingTok process continuous vectors where other models use codes.
    Cost: none.
    When not to use it: to store or predict codes; there are none.
    Resolved: codes have no groups and no levels, ``[..., 0, 0]``, and cannot be decoded. `Quantized.health` counts
    masked vectors too, because only codes mark masked vectors.

    Example:
        >>> output = Identity().build(4)(torch.ones(2, 4))
        >>> output.out.sum().item(), output.codes.shape
        (8.0, torch.Size([2, 0, 0]))
    """

    paper: ClassVar[str] = "continuous units, as in xAR, arXiv 2502.20388"
    cost: ClassVar[str] = "nothing"
    examples: ClassVar[dict[str, str]] = {"plain": "Identity()"}
    discrete: ClassVar[bool] = False
    groups: int = 0
    levels: int = 0

    def _make(self) -> None:
        pass

    @property
    def sizes(self) -> Tensor:
        """``[0, 0]``."""
        return torch.zeros(0, 0, dtype=torch.long)

    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """``[..., 0, 0]``: no codes."""
        self._expect(x, mask)
        return torch.zeros(*x.shape[:-1], 0, 0, dtype=torch.long, device=x.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Raises an error, because there are no codes.

        Raises:
            UserError: always.
        """
        raise UserError(
            "Identity has no codes, so there is nothing to decode; use a quantizer with codes, such as VQ(256)"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """Returns the vectors unchanged."""
        return Quantized(x, self.encode(x, mask), {}, x.detach())

    def table(self) -> None:
        """None."""

    def fold(self) -> Self:
        """A copy."""
        return copy.deepcopy(self)

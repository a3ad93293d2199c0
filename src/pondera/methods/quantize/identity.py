"""Identity: vectors as they are. ``...`` are any leading dimensions, D their width."""

from __future__ import annotations

import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.base import Quantized, Quantizer


class Identity(Quantizer):
    """Passes vectors on uncoded, for models whose units are continuous.

    Source: none; xAR (arXiv 2502.20388) and MingTok read and predict continuous vectors where others take codes.
    Cost: nothing.
    When not to use it: where codes are stored or predicted; it has none.
    Resolved: codes have no groups and no levels, ``[..., 0, 0]``, and cannot be decoded. `Quantized.health` counts masked
    places too, as it is codes that say what was masked.

    Example:
        >>> found = Identity().build(4)(torch.ones(2, 4))
        >>> found.out.sum().item(), found.codes.shape
        (8.0, torch.Size([2, 0, 0]))
    """

    paper: ClassVar[str] = "none: continuous units, as in xAR, arXiv 2502.20388"
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
        """Refuses.

        Raises:
            UserError: always.
        """
        raise UserError(
            "Identity codes nothing, so there is nothing to decode; use a quantizer with codes, such as VQ(256)"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """The vectors themselves."""
        return Quantized(x, self.encode(x, mask), {}, x.detach())

    def table(self) -> None:
        """None."""

    def fold(self) -> Self:
        """A copy."""
        return copy.deepcopy(self)

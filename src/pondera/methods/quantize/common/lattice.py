"""Lattice quantizers: codes without a codebook; each coordinate is rounded, and a code is a combination of values.

Shapes: C coordinates, D width, K codes (all combinations). In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.methods.quantize.base import ABSENT, Quantized, Quantizer
from pondera.methods.quantize.common.estimator import straight_through

MOST_ROWS = 2**16
"""Maximum number of codes for which `table` lists all vectors."""


class Lattice(Quantizer):
    """Shared machinery of `FSQ` and `LFQ`: coordinates, numbering of combinations, masks.

    If C differs from D, a linear map computes the coordinates of a vector, and another one maps them back.

    Args:
        counts: ``[C]``, number of values per coordinate; default: ``None``, C = D with two values each.
    """

    counts_C: Tensor
    steps_C: Tensor
    learning: bool = True
    """False after `fold`."""

    def __init__(self, counts: Sequence[int] | None) -> None:
        super().__init__()
        if counts is not None and math.prod(counts) >= 2**63:
            raise UserError(
                f"{len(counts)} coordinates have more codes than an int64 holds; use a Product of smaller quantizers"
            )
        self.counts = None if counts is None else list(counts)

    def _make(self) -> None:
        if self.counts is None:
            if self.dim > 62:
                raise UserError(
                    f"{type(self).__name__}: a code of {self.dim} bits does not fit an int64; give bits=18 (a linear "
                    "map to 18 coordinates), or use a Product"
                )
            self.counts = [2] * self.dim
        steps = [math.prod(self.counts[:place]) for place in range(len(self.counts))]
        self.register_buffer("counts_C", torch.tensor(self.counts), persistent=False)
        self.register_buffer("steps_C", torch.tensor(steps), persistent=False)
        mapped = len(self.counts) != self.dim
        self.enter = nn.Linear(self.dim, len(self.counts)) if mapped else nn.Identity()
        self.leave = nn.Linear(len(self.counts), self.dim) if mapped else nn.Identity()

    @abstractmethod
    def _bound(self, z: Tensor) -> Tensor:
        """``[..., C]``: coordinates on the scale of their values, before rounding."""

    @abstractmethod
    def _digits(self, bounded: Tensor) -> Tensor:
        """``[..., C]``, int64: the index of the value that each bounded coordinate is rounded to."""

    @abstractmethod
    def _values(self, digits: Tensor) -> Tensor:
        """``[..., C]``: the values with these indices."""

    def _terms(self, z: Tensor, rounded: Tensor) -> dict[str, LossTerm]:
        """Loss terms of the coded coordinates ``[N, C]``."""
        return {}

    @property
    def sizes(self) -> Tensor:
        """``[1, 1]``; see `Quantizer.sizes`."""
        if self.counts is None:
            self._built()
        return torch.tensor([[math.prod(self.counts or ())]])

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        self._expect(x, mask, levels)
        return self._codes(self._digits(self._bound(self._coordinates(x))), mask)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        code = codes[..., 0, 0] if codes.shape[-1] else codes.new_full(codes.shape[:-2], ABSENT)
        digits = code.clamp(min=0)[..., None] // self.steps_C % self.counts_C
        return torch.where(code[..., None] >= 0, self._vectors(self._values(digits)), 0)

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._expect(x, mask, levels)
        z = self._coordinates(x)
        bounded = self._bound(z)
        digits = self._digits(bounded.detach())
        rounded = self._values(digits)
        out = self._vectors(straight_through(bounded, rounded)).to(x.dtype)
        if mask is None:
            terms = self._terms(z.reshape(-1, z.shape[-1]), rounded.reshape(-1, z.shape[-1]))
        else:
            out, terms = torch.where(mask[..., None], out, x), self._terms(z[mask], rounded[mask])
        return Quantized(out, self._codes(digits, mask), terms, x.detach(), sizes=self.sizes)

    def table(self) -> Tensor | None:
        """``[1, 1, K, D]``, all vectors; ``None`` if there are too many codes. See `Quantizer.table`."""
        size = int(self.sizes)
        return self.decode(torch.arange(size).view(-1, 1, 1))[None, None] if size <= MOST_ROWS else None

    def fold(self) -> Self:
        """A copy that does not train; there is no table to fold into."""
        folded = copy.deepcopy(self).requires_grad_(False)
        folded.learning = False
        return folded

    def _coordinates(self, x: Tensor) -> Tensor:
        return self.enter(x.to(self.enter.weight.dtype) if isinstance(self.enter, nn.Linear) else x.float())

    def _vectors(self, values: Tensor) -> Tensor:
        return self.leave(values.to(self.leave.weight.dtype) if isinstance(self.leave, nn.Linear) else values)

    def _codes(self, digits: Tensor, mask: Tensor | None) -> Tensor:
        code = (digits * self.steps_C).sum(-1)
        return (code if mask is None else torch.where(mask, code, ABSENT))[..., None, None]

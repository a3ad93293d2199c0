"""Quantizers made of several of one description: side by side (groups) or one after another (levels).

Shapes: G groups, R levels, K codes, C width of a codebook's rows. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from pondera.ground.errors import UserError
from pondera.model.terms import Term
from pondera.quantize.contract import Quantized, Quantizer


class Composite(Quantizer):
    """What `Product` and `Residual` share.

    Args:
        of: the description of each part.
        count: how many parts.
    """

    axis: ClassVar[int]
    """Of codes, sizes and tables ``[G, R, ...]``, the one that parts stand along."""

    def __init__(self, of: Quantizer, count: int) -> None:
        super().__init__()
        if not isinstance(of, Quantizer):
            raise UserError(
                f"{type(self).__name__}: of={of!r}: give a quantizer, such as {type(self).__name__}(VQ(256), ...)"
            )
        if of.dim:
            raise UserError(
                f"{of!r} is built already, for width {of.dim}; give its description, which parts are built from"
            )
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{type(self).__name__}: {count!r} of {of!r}: give 1 or more")
        self.of, self.count = of, count
        self.parts = nn.ModuleList()

    def _build_parts(self, dim: int) -> None:
        """Makes the parts, each for vectors of this width."""
        self.parts = nn.ModuleList(self.of.build(dim) for _ in range(self.count))
        self.groups = sum(part.groups for part in self.each()) if self.axis == 0 else self.each()[0].groups
        self.levels = sum(part.levels for part in self.each()) if self.axis == 1 else self.each()[0].levels

    def each(self) -> list[Quantizer]:
        """The parts."""
        return cast(list[Quantizer], list(self.parts))

    @property
    def estimator(self) -> str:
        """The parts' gradient estimator; straight-through where theirs has no name."""
        return getattr(self.of, "estimator", "straight_through")

    @property
    def sizes(self) -> Tensor:
        """``[G, R]``; see `Quantizer.sizes`."""
        return torch.cat([part.sizes for part in self.each() or [self.of] * self.count], self.axis)

    def table(self) -> Tensor | None:
        """``[G, R, K, C]``; none where parts have none. See `Quantizer.table`."""
        return self._joint_table(part.table() for part in self.each())

    def fold(self) -> Self:
        """The same of folded parts."""
        self._built()
        return copy.deepcopy(self, {id(self.parts): nn.ModuleList(part.fold() for part in self.each())})

    def begin_step(self, step: int, seed: int) -> None:
        """Tells the parts, all the same: what one of them leaves out for a step, others leave out, too."""
        for part in self.each():
            part.begin_step(step, seed)

    def _joint_table(self, tables: Iterable[Tensor | None]) -> Tensor | None:
        found = [table for table in tables if table is not None]
        return torch.cat(found, self.axis) if found else None


def merged(results: Iterable[Quantized]) -> dict[str, Term]:
    """Terms of several parts under the names that they have in each: sums and counts are added, so a mean is over parts."""
    found: dict[str, Term] = {}
    for result in results:
        for name, term in result.terms.items():
            known = found.get(name)
            found[name] = Term(known.sum + term.sum, known.count + term.count, term.weight) if known else term
    return found

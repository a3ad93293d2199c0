"""Quantizers made of several of one description: side by side (groups) or one after another (levels).

Shapes: G groups, R levels, K codes, C width of a codebook's rows. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.methods.quantize.base import ABSENT, Quantized, Quantizer


class Lookup:
    """Vectors of codes by one bag of rows each, from all tables in one; it holds them once more.

    Args:
        rows: the tensors that the tables were made from; once one of them has changed, `is_of` is false.
        table: ``[G, R, K, C]``.
    """

    def __init__(self, rows: list[Tensor], table: Tensor) -> None:
        self.rows, self.versions = rows, [row_KC._version for row_KC in rows]
        self.codes, width = table.shape[-2:]
        self.rows_nC = torch.cat([table.reshape(-1, width), table.new_zeros(1, width)])  # the last is that of no code
        self.first_GR = torch.arange(len(self.rows_nC) - 1, device=table.device)[:: self.codes].view(table.shape[:2])

    def is_of(self, rows: list[Tensor]) -> bool:
        """Whether the tables would be made of the same."""
        return all(a is b for a, b in zip(self.rows, rows, strict=True)) and self.versions == [x._version for x in rows]

    def __call__(self, codes: Tensor) -> Tensor:
        """``[..., G, r]`` to ``[..., G, C]``."""
        index = codes.clamp(min=0) + self.first_GR[:, : codes.shape[-1]]
        index = index.where(codes != ABSENT, len(self.rows_nC) - 1)
        index = index.where(codes < self.codes, len(self.rows_nC))  # what is no code is no row of another table either
        bags = embedding_bag(index.flatten(0, -2), self.rows_nC, mode="sum")
        return bags.view(*codes.shape[:-1], self.rows_nC.shape[1])


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
        self._lookup: Lookup | None = None

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

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`. Where parts are plain tables that nothing learns now, as when folded, by one look-up."""
        self._built()
        rows = None if torch.compiler.is_compiling() else self._plain_rows()
        fits = codes.ndim > 1 and codes.shape[-2] == self.groups and 0 < codes.shape[-1] <= self.levels
        if not rows or not fits or any(row_KC.requires_grad and torch.is_grad_enabled() for row_KC in rows):
            return self._decode_by_parts(codes)
        if self._lookup is None or not self._lookup.is_of(rows):
            table = self.table()
            assert table is not None
            self._lookup = Lookup(rows, table.detach())
        return self._join(self._lookup(codes))

    @abstractmethod
    def _decode_by_parts(self, codes: Tensor) -> Tensor:
        """What each part decodes, put together."""

    def _plain_rows(self) -> list[Tensor] | None:
        """See `Quantizer._plain_rows`."""
        rows = [part._plain_rows() for part in self.each()]
        found = [each for each in rows if each is not None]
        return sum(found, []) if len(found) == len(rows) else None

    def fold(self) -> Self:
        """The same of folded parts."""
        self._built()
        folded = copy.deepcopy(self, {id(self.parts): nn.ModuleList(part.fold() for part in self.each())})
        folded._lookup = None
        return folded

    def begin_step(self, step: int, seed: int) -> None:
        """Tells the parts, all the same: what one of them leaves out for a step, others leave out, too."""
        for part in self.each():
            part.begin_step(step, seed)

    def _joint_table(self, tables: Iterable[Tensor | None]) -> Tensor | None:
        found = [table for table in tables if table is not None]
        return torch.cat(found, self.axis) if found else None


def merged(results: Iterable[Quantized]) -> dict[str, LossTerm]:
    """Terms of several parts under the names that they have in each: sums and counts are added, so a mean is over parts."""
    found: dict[str, LossTerm] = {}
    for result in results:
        for name, term in result.terms.items():
            known = found.get(name)
            found[name] = LossTerm(known.sum + term.sum, known.count + term.count, term.weight) if known else term
    return found

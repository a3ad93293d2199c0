"""Composite quantizers: several parts with one description, in parallel (groups) or in sequence (levels).

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
    """Decodes codes with one embedding-bag lookup per group, in a copy of all tables.

    Args:
        rows: the tensors that the tables were computed from; once one of them changes, `is_of` is false.
        table: ``[G, R, K, C]``.
    """

    def __init__(self, rows: list[Tensor], table: Tensor) -> None:
        self.rows, self.versions = rows, [row_KC._version for row_KC in rows]
        self.codes, width = table.shape[-2:]
        self.rows_nC = torch.cat([table.reshape(-1, width), table.new_zeros(1, width)])  # the last row is for ABSENT
        self.first_GR = torch.arange(len(self.rows_nC) - 1, device=table.device)[:: self.codes].view(table.shape[:2])

    def is_of(self, rows: list[Tensor]) -> bool:
        """True if these are the tensors that the tables were computed from, unchanged."""
        return all(a is b for a, b in zip(self.rows, rows, strict=True)) and self.versions == [x._version for x in rows]

    def __call__(self, codes: Tensor) -> Tensor:
        """``[..., G, r]`` to ``[..., G, C]``."""
        index = codes.clamp(min=0) + self.first_GR[:, : codes.shape[-1]]
        index = index.where(codes != ABSENT, len(self.rows_nC) - 1)
        index = index.where(codes < self.codes, len(self.rows_nC))  # invalid codes must not select rows of other tables
        bags = embedding_bag(index.flatten(0, -2), self.rows_nC, mode="sum")
        return bags.view(*codes.shape[:-1], self.rows_nC.shape[1])


class Composite(Quantizer):
    """Shared machinery of `Product` and `Residual`.

    Args:
        of: the description of each part.
        count: number of parts.
    """

    axis: ClassVar[int]
    """The axis of codes, sizes and tables ``[G, R, ...]`` along which the parts are concatenated."""

    def __init__(self, of: Quantizer, count: int) -> None:
        super().__init__()
        if not isinstance(of, Quantizer):
            raise UserError(
                f"{type(self).__name__}: of={of!r}: give a quantizer, such as {type(self).__name__}(VQ(256), ...)"
            )
        if of.dim:
            raise UserError(
                f"{of!r} is already built, for width {of.dim}; give its description, from which the parts are built"
            )
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{type(self).__name__}: {count!r} of {of!r}: give 1 or more")
        self.of, self.count = of, count
        self.parts = nn.ModuleList()
        self._lookup: Lookup | None = None

    def _build_parts(self, dim: int) -> None:
        """Creates the parts, each for vectors of this width."""
        self.parts = nn.ModuleList(self.of.build(dim) for _ in range(self.count))
        self.groups = sum(part.groups for part in self.each()) if self.axis == 0 else self.each()[0].groups
        self.levels = sum(part.levels for part in self.each()) if self.axis == 1 else self.each()[0].levels

    def each(self) -> list[Quantizer]:
        """The parts as a list."""
        return cast(list[Quantizer], list(self.parts))

    @property
    def estimator(self) -> str:
        """The gradient estimator of the parts; straight-through if they do not name one."""
        return getattr(self.of, "estimator", "straight_through")

    @property
    def sizes(self) -> Tensor:
        """``[G, R]``; see `Quantizer.sizes`."""
        return torch.cat([part.sizes for part in self.each() or [self.of] * self.count], self.axis)

    def table(self) -> Tensor | None:
        """``[G, R, K, C]``; ``None`` if a part has no table. See `Quantizer.table`."""
        return self._joint_table(part.table() for part in self.each())

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`. If all parts are plain tables without gradient, uses a single lookup."""
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
        """Decodes each part and combines the results."""

    def _plain_rows(self) -> list[Tensor] | None:
        """See `Quantizer._plain_rows`."""
        rows = [part._plain_rows() for part in self.each()]
        present = [each for each in rows if each is not None]
        return sum(present, []) if len(present) == len(rows) else None

    def fold(self) -> Self:
        """See `Quantizer.fold`; folds every part."""
        self._built()
        folded = copy.deepcopy(self, {id(self.parts): nn.ModuleList(part.fold() for part in self.each())})
        folded._lookup = None
        return folded

    def begin_step(self, step: int, seed: int) -> None:
        """Starts a step in all parts with the same seed, so that all parts make the same random choices."""
        for part in self.each():
            part.begin_step(step, seed)

    def _joint_table(self, tables: Iterable[Tensor | None]) -> Tensor | None:
        present = [table for table in tables if table is not None]
        return torch.cat(present, self.axis) if present else None


def merged(results: Iterable[Quantized]) -> dict[str, LossTerm]:
    """Merges the loss terms of several parts by name: sums and counts are added, so a mean is over all parts."""
    terms: dict[str, LossTerm] = {}
    for result in results:
        for name, term in result.terms.items():
            known = terms.get(name)
            terms[name] = LossTerm(known.sum + term.sum, known.count + term.count, term.weight) if known else term
    return terms

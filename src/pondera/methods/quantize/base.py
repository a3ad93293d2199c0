"""The seam `quantize/`: which discrete code stands for a vector.

Shapes: N vectors (all leading dimensions together), D width, G groups, R levels, K codes per codebook, C width of a
codebook's rows. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.core.spec_repr import SpecRepr
from pondera.methods.quantize.common.health import Health, health
from pondera.methods.quantize.common.packing import bits_for, packed_bytes

ABSENT = -1
"""Code of a place that is masked out, or of a level that was left off."""
MERGES = ("raw_logits", "softmax", "hard")


@dataclass
class Quantized:
    """What every quantizer returns, always with the same fields.

    Args:
        out: ``[..., D]``, the vectors that the codes stand for; the gradient that reaches the input through it is the
            estimator's. Masked places hold the input.
        codes: ``[..., G, R]``, int64; `ABSENT` where masked, or where a level was left off.
        terms: loss terms by name, as sums and counts over the elements that were quantized.
        given: ``[..., D]``, the input without gradient, for `health`.
        table: ``[G, R, K, C]``, the codebooks without gradient; none where codes are not rows of a table.
        sizes: ``[G, R]``, how many codes each place has; none: K.
    """

    out: Tensor
    codes: Tensor
    terms: dict[str, LossTerm] = field(default_factory=dict)
    given: Tensor | None = None
    table: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The weighted sum of the terms' means; zero where there are none, or nothing was quantized."""
        if not self.terms:
            return self.out.new_zeros(())
        return torch.stack([term.weight * term.mean() for term in self.terms.values()]).sum()

    @cached_property
    def health(self) -> Health:
        """Usage, perplexity, effective ranks and split error of this batch; computed when first asked for."""
        assert self.given is not None
        return health(self.given, self.out.detach(), self.codes, self.table, self.sizes)


class Quantizer(SpecRepr, nn.Module, ABC):
    """Gives vectors of width D codes, and codes vectors.

    A quantizer is described by its constructor, without a width, and made by `build`; so one description serves every
    part of a product and every level of a residual. D is split over G groups, each coded by R levels in turn, each level
    one of K codes; so a vector's codes have the shape ``[G, R]`` and its rate is the sum of their bits.

    Class attributes `paper` and `cost` say where it is from and what it costs in plain words (``pondera methods`` prints
    them).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests, on vectors of width 6. A name that ends in ``no gradient`` or ``own
    gradient`` says that the estimator is not straight-through."""
    discrete: ClassVar[bool] = True
    """False where nothing is coded, so that there are neither codes nor a table."""

    dim: int = 0
    """D; 0 before `build`."""
    groups: int = 1
    levels: int = 1

    def build(self, dim: int) -> Self:
        """A quantizer of this description with weights of its own, for vectors of width `dim`.

        Draws from torch's generator; the description itself stays as it was, so it can be built again.

        Raises:
            UserError: a width that it cannot take.
        """
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise UserError(f"{type(self).__name__}: the width of vectors is 1 or more, got {dim!r}")
        if self.dim:
            raise UserError(f"{self!r} is built already, for width {self.dim}; build its description again instead")
        made = copy.deepcopy(self)
        made.dim = dim
        made._make()
        return made

    def _built(self) -> None:
        """Refuses to work as a description."""
        if not self.dim:
            raise UserError(f"{self!r} is a description; make a quantizer of it first: quantizer.build(dim)")

    def _expect(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> None:
        """Refuses vectors, masks and numbers of levels that do not fit."""
        self._built()
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise UserError(f"{self!r}: vectors of shape {tuple(x.shape)}; the last dimension must be {self.dim}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise UserError(f"{self!r}: a mask of shape {tuple(mask.shape)} for vectors of shape {tuple(x.shape)}")
        if levels is not None and not 1 <= levels <= self.levels:
            raise UserError(f"{self!r} has levels 1 to {self.levels}, got levels={levels}")

    @abstractmethod
    def _make(self) -> None:
        """Creates weights and buffers for ``self.dim``."""

    @property
    @abstractmethod
    def sizes(self) -> Tensor:
        """``[G, R]``, int64: how many codes each place has (K)."""

    @abstractmethod
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """The codes of vectors, without gradient.

        Args:
            x: ``[..., D]``.
            mask: ``[...]``, false where there is nothing to code.
            levels: only the first so many; the others are `ABSENT`.

        Returns:
            ``[..., G, R]``, int64.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for, with gradient to the codebooks.

        Args:
            codes: ``[..., G, r]`` with any r up to R; a place that is `ABSENT` adds nothing.

        Returns:
            ``[..., D]``.
        """

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """Quantizes; in training mode also what the update rule does with the batch (statistics, respawn).

        Args:
            x: ``[..., D]``.
            mask: ``[...]``, false where a place must neither be coded nor counted.
            levels: as for `encode`.
        """

    @abstractmethod
    def table(self) -> Tensor | None:
        """``[G, R, K, C]``: the codebooks as they stand, with gradient to what they are made of; none: no table.

        Where codebooks differ in size, K is the largest and the rows beyond a codebook's own are zero.
        """

    def _plain_rows(self) -> list[Tensor] | None:
        """The tensors ``[K, C]`` that `table` consists of, where it is nothing but them side by side."""
        return None

    def soft_decode(self, logits: Tensor, merge: str = "softmax", table: Tensor | None = None) -> Tensor:
        """Vectors from scores of codes instead of codes.

        Args:
            logits: ``[..., G, R, K]``.
            merge: ``"softmax"`` weighs rows by probability; ``"raw_logits"`` by the scores themselves, so that the result
                is linear in them; ``"hard"`` takes the best row and passes no gradient to the scores.
            table: what `table` has returned, where it is at hand.

        Returns:
            ``[..., D]``.

        Raises:
            UserError: another merge, or a quantizer without a table.
        """
        if merge not in MERGES:
            raise unknown("merge", merge, MERGES)
        table = self.table() if table is None else table
        if table is None:
            raise UserError(
                f"{type(self).__name__} has no table of codes to weigh; use VQ, SimVQ, or a Product of them"
            )
        if merge != "raw_logits" and (self.sizes < table.shape[-2]).any():
            code_K = torch.arange(table.shape[-2], device=logits.device)
            logits = logits.masked_fill(code_K >= self.sizes[..., None].to(logits.device), -torch.inf)
        if merge == "hard":
            order_G, order_R = (torch.arange(count, device=table.device) for count in table.shape[:2])
            return self._join(table[order_G[:, None], order_R, logits.argmax(-1)].sum(-2))
        weights = logits.softmax(-1) if merge == "softmax" else logits
        return self._join(torch.einsum("...grk,grkc->...gc", weights, table.to(weights.dtype)))

    def _join(self, parts: Tensor) -> Tensor:
        """``[..., G, C]`` to ``[..., D]``: groups side by side."""
        return parts.flatten(-2)

    @abstractmethod
    def fold(self) -> Quantizer:
        """The same codes and vectors exactly, from plain tables: nothing in it learns any more."""

    def begin_step(self, step: int, seed: int) -> None:
        """Told before each optimizer step: opens the warm-up gate, and seeds what is drawn, alike on every rank."""
        for child in self.children():
            if isinstance(child, Quantizer):
                child.begin_step(step, seed)

    @property
    def bits(self) -> int:
        """Bits of one vector's codes as they are stored."""
        return sum(bits_for(int(size)) for size in self.sizes.flatten())

    def nbytes(self, vectors: int) -> int:
        """Bytes that the packed codes of so many vectors take, to the byte."""
        return packed_bytes(vectors, self.sizes)

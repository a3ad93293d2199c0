"""Base class of quantizers, which map vectors to discrete codes and back.

Shapes: N vectors (all leading dimensions flattened), D width, G groups, R levels, K codes per codebook, C width of a
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
"""Code of a masked vector, or of a level that was not run."""
MERGES = ("raw_logits", "softmax", "hard")


@dataclass
class Quantized:
    """The output of every quantizer, with the same fields for all methods.

    Args:
        out: ``[..., D]``, the decoded vectors. The gradient estimator defines the gradient that the input gets through
            them. Masked vectors equal the input.
        codes: ``[..., G, R]``, int64; `ABSENT` for masked vectors and for levels that were not run.
        terms: loss terms by name, as sums and counts over the quantized elements.
        given: ``[..., D]``, the input, detached, for `health`.
        table: ``[G, R, K, C]``, the codebooks, detached; ``None`` if codes are not rows of a table.
        sizes: ``[G, R]``, number of codes per group and level; ``None``: K.
    """

    out: Tensor
    codes: Tensor
    terms: dict[str, LossTerm] = field(default_factory=dict)
    given: Tensor | None = None
    table: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """The weighted sum of the means of all terms; zero without terms or quantized vectors."""
        if not self.terms:
            return self.out.new_zeros(())
        return torch.stack([term.weight * term.mean() for term in self.terms.values()]).sum()

    @cached_property
    def health(self) -> Health:
        """Usage, perplexity, effective ranks and split error of this batch; computed on first access."""
        assert self.given is not None
        return health(self.given, self.out.detach(), self.codes, self.table, self.sizes)


class Quantizer(SpecRepr, nn.Module, ABC):
    """Maps vectors of width D to codes, and codes to vectors.

    The constructor stores the settings without a width; `build` creates the quantizer. One description can therefore
    serve every part of a product and every level of a residual. D is split into G groups. Each group is coded by R
    successive levels, each with K codes, so the codes of a vector have shape ``[G, R]`` and its rate is the sum of
    their bits.

    The class attribute `paper` gives the source and `cost` the cost in plain words (``pondera methods`` prints both).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests, on vectors of width 6. A name that ends in ``no gradient`` or ``own
    gradient`` says that the estimator is not straight-through."""
    discrete: ClassVar[bool] = True
    """False if the method is the identity, without codes and without a table."""

    dim: int = 0
    """D; 0 before `build`."""
    groups: int = 1
    levels: int = 1

    def build(self, dim: int) -> Self:
        """Creates a quantizer with these settings and new weights, for vectors of width `dim`.

        Draws from torch's generator. The description itself does not change, so it can be built again.

        Raises:
            UserError: the quantizer does not support this width.
        """
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise UserError(f"{type(self).__name__}: the width of vectors must be 1 or more, got {dim!r}")
        if self.dim:
            raise UserError(f"{self!r} is already built, for width {self.dim}; build its description again instead")
        quantizer = copy.deepcopy(self)
        quantizer.dim = dim
        quantizer._make()
        return quantizer

    def _built(self) -> None:
        """Raises if this is a description that is not built."""
        if not self.dim:
            raise UserError(f"{self!r} is a description; build a quantizer from it first: quantizer.build(dim)")

    def _expect(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> None:
        """Raises if the vectors, the mask or the number of levels do not fit."""
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
        """``[G, R]``, int64: number of codes per group and level (K)."""

    @abstractmethod
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """Encodes vectors, without gradient.

        Args:
            x: ``[..., D]``.
            mask: ``[...]``, false for vectors to skip.
            levels: number of levels to run; the codes of the others are `ABSENT`. Default: ``None``, all.

        Returns:
            ``[..., G, R]``, int64.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes to vectors, with gradient to the codebooks.

        Args:
            codes: ``[..., G, r]`` with any r up to R; an `ABSENT` code adds zero.

        Returns:
            ``[..., D]``.
        """

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """Quantizes vectors; in training mode the update rule also uses the batch (statistics, respawn).

        Args:
            x: ``[..., D]``.
            mask: ``[...]``, false for vectors that must be neither coded nor counted.
            levels: see `encode`.
        """

    @abstractmethod
    def table(self) -> Tensor | None:
        """``[G, R, K, C]``: the current codebooks, with gradient to their parameters; ``None`` without a table.

        If codebooks differ in size, K is the largest size, and the rows beyond a codebook's size are zero.
        """

    def _plain_rows(self) -> list[Tensor] | None:
        """The tensors ``[K, C]`` that `table` stacks, or ``None`` if it is not a plain stack of tensors."""
        return None

    def soft_decode(self, logits: Tensor, merge: str = "softmax", table: Tensor | None = None) -> Tensor:
        """Decodes scores of codes to vectors.

        Args:
            logits: ``[..., G, R, K]``.
            merge: ``"softmax"`` weights the rows by probability; ``"raw_logits"`` weights them by the scores, so the
                result is linear in the scores; ``"hard"`` takes the best row and gives the scores no gradient.
            table: a result of `table`, to avoid computing it again; default: ``None``, compute it.

        Returns:
            ``[..., D]``.

        Raises:
            UserError: unknown merge, or a quantizer without a table.
        """
        if merge not in MERGES:
            raise unknown("merge", merge, MERGES)
        table = self.table() if table is None else table
        if table is None:
            raise UserError(
                f"{type(self).__name__} has no table of codes to weight; use VQ, SimVQ, or a Product of them"
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
        """``[..., G, C]`` to ``[..., D]``: concatenates the groups."""
        return parts.flatten(-2)

    @abstractmethod
    def fold(self) -> Quantizer:
        """A copy with plain tables and exactly the same codes and vectors; it does not train."""

    def begin_step(self, step: int, seed: int) -> None:
        """Starts an optimizer step: may end the warm-up, and seeds random draws identically on every rank."""
        for child in self.children():
            if isinstance(child, Quantizer):
                child.begin_step(step, seed)

    @property
    def bits(self) -> int:
        """Bits of the stored codes of one vector."""
        return sum(bits_for(int(size)) for size in self.sizes.flatten())

    def nbytes(self, vectors: int) -> int:
        """Size of the packed codes of this many vectors, in bytes."""
        return packed_bytes(vectors, self.sizes)

"""Residual quantization: each level quantizes the residual of the levels before it.

Shapes: N vectors, D width. In docstrings ``...`` are any leading dimensions, G groups, R levels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import reduce
from typing import ClassVar, Self

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.base import ABSENT, Quantized, Quantizer
from pondera.methods.quantize.common.codebook import Codebook, chosen, scatter_rows
from pondera.methods.quantize.common.composite import Composite, merged
from pondera.methods.quantize.common.estimator import estimate
from pondera.methods.quantize.common.nearest import nearest_by_levels
from pondera.methods.quantize.common.warm_up import WarmUp


class Residual(Composite):
    """Quantizes a vector, then the remaining error, and so on; the decoded vector is the sum over all levels.

    The first levels alone decode to a coarser vector, so stored codes can be truncated: ``decode(codes[..., :r])``.

    Source: residual VQ as in SoundStream, arXiv 2107.03312, section III-C, including quantizer dropout; of SimVQ in
    VQKV, arXiv 2603.16435, as ``Residual(SimVQ(256), levels=...)``.
    Cost: R times the cost of one level; levels run one after another.
    When not to use it: if the parts of a vector are independent; `Product` codes them as well, in parallel. With
    quantizers of fixed values, such as `FSQ`, because the residuals shrink while the spacing of the values does not.
    Resolved: the loss terms of each level refer to its own residual, and the mean is over all elements of all levels
    that ran. The gradient estimator acts once, from the whole vector to the sum. Levels get no gradient from each
    other, because residuals are computed from detached sums. Dropout draws the number of levels once per optimizer
    step, identically on every rank and in every micro-batch; SoundStream draws it per example. A level that still
    collects vectors for its initialization blocks the levels after it, whose residuals would be zero. Until all levels
    are initialized, vectors pass through unquantized.

    Args:
        of: the description of a level's quantizer; it may have several groups or levels.
        levels: number of levels.
        dropout: probability that a training step runs only the first levels; their number is uniform from 1 to all.

    Example:
        >>> from pondera.methods.quantize.vq import VQ
        >>> quantizer = Residual(VQ(16, init="kmeans"), levels=3).build(4)
        >>> x = torch.randn(200, 4)
        >>> codes = quantizer(x).codes
        >>> errors = [(quantizer.decode(codes[..., :r]) - x).square().mean().item() for r in range(4)]
        >>> codes.shape, errors == sorted(errors, reverse=True)
        (torch.Size([200, 1, 3]), True)
    """

    paper: ClassVar[str] = "residual VQ (SoundStream), arXiv 2107.03312"
    cost: ClassVar[str] = "bits of all levels; R times the encoding and the decoding of one"
    examples: ClassVar[dict[str, str]] = {
        "plain": "Residual(VQ(5), levels=3)",
        "dropout": "Residual(VQ(4, update='ema', init='kmeans'), levels=2, dropout=0.5)",
        "one level": "Residual(SimVQ(6), levels=1)",
        "of products": "Residual(Product(VQ(4), groups=2, order=[0, 3, 1, 4, 2, 5]), levels=2)",
        "nested": "Residual(Residual(VQ(4), levels=2), levels=2)",
        "lattice": "Residual(Scalar(3), levels=2)",
    }
    axis: ClassVar[int] = 1

    def __init__(self, of: Quantizer, levels: int, dropout: float = 0.0) -> None:
        super().__init__(of, levels)
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout={dropout}: give a probability from 0 to 1")
        self.dropout = dropout
        self._kept: int | None = None

    def _make(self) -> None:
        self._build_parts(self.dim)

    def begin_step(self, step: int, seed: int) -> None:
        """Draws the number of levels for this step."""
        super().begin_step(step, seed)
        draw = random.Random(f"{seed}:{step}")
        drops = step >= 0 and draw.random() < self.dropout
        self._kept = draw.randint(1, self.levels) if drops else None

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        self._expect(x, mask, levels)
        parts = [part for part, _ in self._wanted(levels)]
        if all(isinstance(part, Codebook) and not _waits(part) for part in parts):
            return self._encode_at_once(x, mask, parts)
        residual, codes = _wide(x), []
        for part, wanted in self._wanted(levels):
            codes.append(part.encode(residual, mask, wanted))
            if _waits(part):
                break
            residual = residual - part.decode(codes[-1])
        return self._padded(codes)

    def _encode_at_once(self, x: Tensor, mask: Tensor | None, parts: list[Quantizer]) -> Tensor:
        """`encode` for levels that are all plain codebooks."""
        x_NC = x.reshape(-1, self.dim)
        kept_N = None if mask is None else mask.flatten().nonzero()[:, 0]
        table = self._joint_table(part.table() for part in parts)
        assert table is not None
        codes_NR = scatter_rows(nearest_by_levels(chosen(x_NC, kept_N), table[0]), kept_N, len(x_NC))
        return self._padded([codes_NR.view(*x.shape[:-1], 1, len(parts))])

    def _plain_rows(self) -> list[Tensor] | None:
        """See `Quantizer._plain_rows`; ``None`` for nested residuals, where one lookup would sum in another order."""
        return super()._plain_rows() if self.each()[0].levels == 1 else None

    def _decode_by_parts(self, codes: Tensor) -> Tensor:
        pieces = codes.split(self.each()[0].levels, -1)
        return reduce(torch.add, [part.decode(piece) for part, piece in zip(self.each(), pieces, strict=False)])

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._expect(x, mask, levels)
        wide = residual = _wide(x)
        outputs: list[Quantized] = []
        waiting = False
        for part, wanted in self._wanted(self._kept if levels is None and self.training else levels):
            outputs.append(part(residual, mask, wanted))
            residual = residual - outputs[-1].out.detach()
            if waiting := _waits(part):
                break
        out = wide
        if not waiting:
            out = estimate(self.estimator, wide, reduce(torch.add, [result.out for result in outputs]))
            out = out if mask is None else torch.where(mask[..., None], out, wide)
        if self.training:
            # Distributed training averages the gradients of every weight, so each one needs a gradient.
            idle = self.each()[len(outputs) - waiting :]
            out = out + sum(0 * weight.sum() for part in idle for weight in part.parameters())
        return Quantized(
            out.to(x.dtype),
            self._padded([result.codes for result in outputs]),
            merged(outputs),
            x.detach(),
            self._joint_table([result.table for result in outputs] + self._tables_from(len(outputs))),
            self.sizes,
        )

    def fold(self) -> Self:
        """See `Quantizer.fold`; the folded quantizer has no dropout."""
        folded = super().fold()
        folded.dropout, folded._kept = 0.0, None
        return folded

    def _wanted(self, levels: int | None) -> Iterator[tuple[Quantizer, int | None]]:
        """The parts that run, and their numbers of levels."""
        left = self.levels if levels is None else levels
        for part in self.each():
            if left > 0 or levels is None:
                yield part, None if levels is None else min(left, part.levels)
            left -= part.levels

    def _padded(self, codes: list[Tensor]) -> Tensor:
        """Concatenates the codes of all levels and pads missing levels with `ABSENT`."""
        joined = torch.cat(codes, -1)
        return torch.nn.functional.pad(joined, (0, self.levels - joined.shape[-1]), value=ABSENT)

    @torch.no_grad()
    def _tables_from(self, first: int) -> list[Tensor | None]:
        """The tables of the levels that did not run."""
        return [part.table() for part in self.each()[first:]]

    def _join(self, parts: Tensor) -> Tensor:
        """See `Quantizer._join`; all levels join their groups in the same way."""
        return self.each()[0]._join(parts)


def _waits(part: Quantizer) -> bool:
    """True if vectors still pass through this part unquantized."""
    return any(module.closed for module in part.modules() if isinstance(module, WarmUp))


def _wide(x: Tensor) -> Tensor:
    """Converts to at least float32, because residuals are small compared with the vectors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Residual quantization: each level codes what the levels before it left.

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
    """Codes a vector, then what is left of it, and so on; the vector is the sum of what the codes stand for.

    The first codes alone decode to a coarser vector, so a stored vector can be cut short: ``decode(codes[..., :r])``.

    Source: residual VQ as in SoundStream, arXiv 2107.03312, section III-C, quantizer dropout included; of SimVQ in VQKV,
    arXiv 2603.16435, as ``Residual(SimVQ(256), levels=...)``.
    Cost: R times that of a level, one after another.
    When not to use it: where parts of a vector are independent: `Product` codes them alike, all at once. Of quantizers with
    fixed values, such as `FSQ`, whose values stay as far apart while rests shrink.
    Resolved: each level's terms are of its own rest, and the mean is over all elements of all levels that ran. The
    estimator of the levels acts once, from the whole vector to the sum. One level does not see the other's gradient: rests
    are what is left of detached sums. Dropout draws how many levels run once per optimizer step, alike on every rank and
    in every part of a batch, where SoundStream draws per example. A level that waits for vectors to start from holds back
    those after it, which would meet rests of zero; until all have started, vectors pass through.

    Args:
        of: the description of a level's quantizer; it may have groups or levels of its own.
        levels: how many of it.
        dropout: the probability that a training step runs only the first levels, any number from 1 to all of them.

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
            raise UserError(f"dropout={dropout}: give a probability")
        self.dropout = dropout
        self._kept: int | None = None

    def _make(self) -> None:
        self._build_parts(self.dim)

    def begin_step(self, step: int, seed: int) -> None:
        """Draws how many levels this step runs."""
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
        rest, codes = _wide(x), []
        for part, wanted in self._wanted(levels):
            codes.append(part.encode(rest, mask, wanted))
            if _waits(part):
                break
            rest = rest - part.decode(codes[-1])
        return self._padded(codes)

    def _encode_at_once(self, x: Tensor, mask: Tensor | None, parts: list[Quantizer]) -> Tensor:
        """The same where every level is one table."""
        x_NC = x.reshape(-1, self.dim)
        kept_N = None if mask is None else mask.flatten().nonzero()[:, 0]
        table = self._joint_table(part.table() for part in parts)
        assert table is not None
        codes_NR = scatter_rows(nearest_by_levels(chosen(x_NC, kept_N), table[0]), kept_N, len(x_NC))
        return self._padded([codes_NR.view(*x.shape[:-1], 1, len(parts))])

    def _plain_rows(self) -> list[Tensor] | None:
        """See `Quantizer._plain_rows`; none of residuals of residuals, which one look-up would sum in another order."""
        return super()._plain_rows() if self.each()[0].levels == 1 else None

    def _decode_by_parts(self, codes: Tensor) -> Tensor:
        pieces = codes.split(self.each()[0].levels, -1)
        return reduce(torch.add, [part.decode(piece) for part, piece in zip(self.each(), pieces, strict=False)])

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._expect(x, mask, levels)
        wide = rest = _wide(x)
        found: list[Quantized] = []
        waiting = False
        for part, wanted in self._wanted(self._kept if levels is None and self.training else levels):
            found.append(part(rest, mask, wanted))
            rest = rest - found[-1].out.detach()
            if waiting := _waits(part):
                break
        out = wide
        if not waiting:
            out = estimate(self.estimator, wide, reduce(torch.add, [result.out for result in found]))
            out = out if mask is None else torch.where(mask[..., None], out, wide)
        if self.training:
            # Processes that average gradients wait for those of every weight.
            idle = self.each()[len(found) - waiting :]
            out = out + sum(0 * weight.sum() for part in idle for weight in part.parameters())
        return Quantized(
            out.to(x.dtype),
            self._padded([result.codes for result in found]),
            merged(found),
            x.detach(),
            self._joint_table([result.table for result in found] + self._tables_from(len(found))),
            self.sizes,
        )

    def fold(self) -> Self:
        """The same of folded levels; none is dropped any more."""
        folded = super().fold()
        folded.dropout, folded._kept = 0.0, None
        return folded

    def _wanted(self, levels: int | None) -> Iterator[tuple[Quantizer, int | None]]:
        """The parts that run, and how many levels of their own."""
        left = self.levels if levels is None else levels
        for part in self.each():
            if left > 0 or levels is None:
                yield part, None if levels is None else min(left, part.levels)
            left -= part.levels

    def _padded(self, codes: list[Tensor]) -> Tensor:
        """All levels' codes, the missing ones `ABSENT`."""
        found = torch.cat(codes, -1)
        return torch.nn.functional.pad(found, (0, self.levels - found.shape[-1]), value=ABSENT)

    @torch.no_grad()
    def _tables_from(self, first: int) -> list[Tensor | None]:
        """Those of the levels that did not run."""
        return [part.table() for part in self.each()[first:]]

    def _join(self, parts: Tensor) -> Tensor:
        """See `Quantizer._join`: every level joins its groups in the same way."""
        return self.each()[0]._join(parts)


def _waits(part: Quantizer) -> bool:
    """Whether vectors still pass it unquantized."""
    return any(module.closed for module in part.modules() if isinstance(module, WarmUp))


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: rests are small beside the vectors."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Scalar quantization: rounds each dimension to evenly spaced values within a calibrated range.

Shapes: N vectors, D width, K values per dimension (the maximum over dimensions). In docstrings ``...`` are any leading
dimensions.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.base import ABSENT, Quantized, Quantizer
from pondera.methods.quantize.common.codebook import chosen
from pondera.methods.quantize.common.estimator import straight_through
from pondera.methods.quantize.common.finite import FiniteVectors
from pondera.methods.quantize.common.ranks import summed


class Scalar(Quantizer):
    """Rounds each dimension to one of a few evenly spaced values; every dimension is a group with its own code.

    Nothing is learned. The range of a dimension is its mean plus and minus a multiple of its standard deviation,
    measured in the first training steps; afterwards it is fixed.

    Source: CubiD, arXiv 2603.19232, which codes wide features of frozen encoders like this, because one codebook for
    all dimensions fails.
    Cost: a few operations per number; D codes per vector.
    When not to use it: below 1 bit per number, or if dimensions are strongly dependent.
    Resolved: values are the centers of equal cells; numbers beyond the range map to the outermost value. The default
    range minimizes the squared error for normally distributed numbers: from 1.6 standard deviations for 2 values to 2.3
    for 8 and 3.0 for 32. The gradient is straight-through, also beyond the range.

    Args:
        levels: number of values, one for all dimensions or one per dimension.
        low, high: ends of the range, one for all dimensions or one per dimension; default: ``None``, calibrated.
        spread: half the calibrated range in standard deviations; default: ``None``, the range with the least error.
        steps: number of optimizer steps for calibration; without `begin_step`, calls in training mode.

    Example:
        >>> quantizer = Scalar(4, low=-1.0, high=1.0).build(3)
        >>> output = quantizer(torch.tensor([-0.9, 0.1, 5.0]))
        >>> output.out.tolist(), output.codes.flatten().tolist(), quantizer.bits
        ([-0.75, 0.25, 0.75], [0, 2, 3], 6)
    """

    paper: ClassVar[str] = "per-dimension levels (CubiD), arXiv 2603.19232"
    cost: ClassVar[str] = "D codes per vector, rounding only; two numbers per dimension"
    examples: ClassVar[dict[str, str]] = {
        "plain": "Scalar(4)",
        "ranges": "Scalar([2, 3, 4, 5, 1, 7], spread=2.0)",
        "fixed": "Scalar(5, low=-1.0, high=2.0)",
    }

    counts_D: Tensor
    low_D: Tensor
    high_D: Tensor
    spread_D: Tensor
    mean_D: Tensor
    square_D: Tensor
    num_seen: Tensor

    def __init__(
        self,
        levels: int | list[int] = 16,
        low: float | list[float] | None = None,
        high: float | list[float] | None = None,
        spread: float | None = None,
        steps: int = 100,
    ) -> None:
        super().__init__()
        counts = levels if isinstance(levels, list) else [levels]
        if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
            raise UserError(f"levels={levels!r}: give the number of values per dimension, 1 or more, or a list of them")
        if (low is None) != (high is None):
            raise UserError(f"low={low}, high={high}: give both ends of the range, or neither to calibrate it")
        if spread is not None and spread <= 0:
            raise UserError(f"spread={spread}: give a number of standard deviations above 0")
        if steps < 1:
            raise UserError(f"steps={steps}: give 1 or more; to skip calibration, give low and high")
        self.counts, self.low, self.high, self.spread, self.steps = levels, low, high, spread, steps
        self._finite = FiniteVectors()
        self._step, self._steps_announced, self._folded = 0, False, False

    def _make(self) -> None:
        self.register_buffer("counts_D", self._per_dimension("levels", self.counts), persistent=False)
        self.groups = self.dim
        if self.low is not None:
            for name, end in (("low", self.low), ("high", self.high)):
                self.register_buffer(f"{name}_D", self._per_dimension(name, end).float())
            if not (self.low_D < self.high_D).all():
                raise UserError(f"low={self.low}, high={self.high}: low must be below high")
            return
        best = {
            count: _best_spread(count) if self.spread is None else self.spread for count in set(self.counts_D.tolist())
        }
        spread_D = torch.tensor([best[count] for count in self.counts_D.tolist()])
        self.register_buffer("spread_D", spread_D, persistent=False)
        self.register_buffer("mean_D", torch.zeros(self.dim))
        self.register_buffer("square_D", torch.ones(self.dim))
        self.register_buffer("num_seen", torch.zeros(()))

    def _per_dimension(self, name: str, given: object) -> Tensor:
        values = torch.as_tensor(given)
        if values.ndim and values.shape != (self.dim,):
            raise UserError(
                f"{self!r}: {name} has {len(values)} entries for vectors of width {self.dim}; give 1 or {self.dim}"
            )
        return values.expand(self.dim).clone()

    def ranges(self) -> tuple[Tensor, Tensor]:
        """``[D]`` each: the start of the first cell, and the width of a cell."""
        if self.low is None:
            half_D = self.spread_D * self.square_D.sqrt()
            low_D, high_D = self.mean_D - half_D, self.mean_D + half_D
        else:
            low_D, high_D = self.low_D, self.high_D
        return low_D, ((high_D - low_D) / self.counts_D).clamp(min=torch.finfo(low_D.dtype).tiny)

    @property
    def sizes(self) -> Tensor:
        """``[D, 1]``; see `Quantizer.sizes`."""
        self._built()
        return self.counts_D[:, None].cpu()

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        self._expect(x, mask, levels)
        low_D, cell_D = self.ranges()
        cells = ((x.float() - low_D) / cell_D).floor().nan_to_num(nan=0.0)  # nan gets a valid code
        codes = cells.clamp(min=0).minimum(self.counts_D - 1).long()
        return (codes if mask is None else torch.where(mask[..., None], codes, ABSENT))[..., None]

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        self._built()
        low_D, cell_D = self.ranges()
        codes = codes[..., 0] if codes.shape[-1] else codes.new_full(codes.shape[:-1], ABSENT)
        return torch.where(codes >= 0, low_D + (codes + 0.5) * cell_D, 0)

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`; in training mode the first steps calibrate the ranges."""
        self._expect(x, mask, levels)
        if self.training and self.low is None and not self._folded:
            if self._step < self.steps:
                x_ND = (x if mask is None else x[mask]).detach().reshape(-1, self.dim).float()
                self._calibrate(chosen(x_ND, self._finite.of(x_ND, repr(self))))
            self._step += not self._steps_announced
        codes = self.encode(x, mask)
        out = straight_through(x, self.decode(codes).to(x.dtype))
        out = out if mask is None else torch.where(mask[..., None], out, x)
        return Quantized(out, codes, {}, x.detach(), self.table(), self.sizes)

    def table(self) -> Tensor:
        """``[D, 1, K, 1]``; see `Quantizer.table`."""
        self._built()
        number_K1 = torch.arange(int(self.counts_D.max()), device=self.counts_D.device)[:, None]
        codes_KD = torch.where(number_K1 < self.counts_D, number_K1, ABSENT)
        return self.decode(codes_KD[..., None]).T[:, None, :, None]

    def fold(self) -> Self:
        """A copy with fixed ranges."""
        self._built()
        folded = copy.deepcopy(self)
        folded._folded = True
        return folded

    def begin_step(self, step: int, seed: int) -> None:
        """Counts the calibration steps."""
        if step >= 0:
            self._step, self._steps_announced = step, True

    @torch.no_grad()
    def _calibrate(self, x_ND: Tensor) -> None:
        """Updates mean and variance with the vectors of all ranks."""
        count = summed(x_ND.new_tensor(float(len(x_ND))))
        mean_D = summed(x_ND.sum(0)) / count.clamp(min=1)
        squares_D = summed((x_ND - mean_D).square().sum(0))
        total = self.num_seen + count
        if total:
            apart_D, share = mean_D - self.mean_D, count / total
            known_D = self.square_D * (1 - share) if self.num_seen else torch.zeros_like(squares_D)
            self.square_D.copy_(known_D + squares_D / total + apart_D.square() * share * (1 - share))
            self.mean_D += apart_D * share
            self.num_seen.copy_(total)


def _best_spread(count: int) -> float:
    """Half the range, in standard deviations, with the least squared error for normally distributed numbers."""
    x_X1 = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    spread_S = torch.linspace(1, 6, 251, dtype=torch.float64)
    cell_S = 2 * spread_S / count
    codes_XS = ((x_X1 + spread_S) / cell_S).floor().clamp(0, count - 1)
    error_XS = (x_X1 + spread_S - (codes_XS + 0.5) * cell_S).square()
    return float(spread_S[(error_XS * (-x_X1.square() / 2).exp()).sum(0).argmin()])

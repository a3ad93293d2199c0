"""FSQ, finite scalar quantization: bounds and rounds each coordinate; the codebook is the set of all combinations.

Shapes: N vectors, C coordinates, D width. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.common.lattice import Lattice

MARGIN = 1e-3
"""How far a coordinate can exceed the outermost values, as a share."""


class FSQ(Lattice):
    """Bounds each of C coordinates with tanh and rounds it to one of L values; a code is a combination of the C values.

    There is no learned codebook, so no code can die, and there is no auxiliary loss.

    Source: Finite Scalar Quantization, arXiv 2309.15505, section 3.1 and appendix A.1.
    Cost: C tanh per vector, and two linear maps if C differs from D.
    When not to use it: if the encoder does not train with it (tanh distorts the vectors; use `Scalar` or a codebook);
    as `of` of a `Residual`, because the residuals shrink while the spacing of the values does not.
    Resolved: the shift that makes an even number of values symmetric uses atanh, so that 0 maps to 0; the public code
    uses tan. The margin points outwards; inwards, two values would have no shift. The gradient is that of the bounded
    coordinate: rounding is straight-through, tanh is differentiated.

    Args:
        levels: number of values of each coordinate. The paper suggests 5 or more, such as ``[8, 5, 5, 5]`` for about
            2^10 codes, ``[7, 5, 5, 5, 5]`` for 2^12, ``[8, 8, 8, 5, 5, 5]`` for 2^16.

    Example:
        >>> quantizer = FSQ([8, 5, 5, 5]).build(4)
        >>> output = quantizer(torch.tensor([0.0, 0.3, -9.0, 9.0]))
        >>> output.out.tolist(), output.codes.tolist(), quantizer.bits
        ([0.0, 0.5, -1.0, 1.0], [[828]], 10)
    """

    paper: ClassVar[str] = "FSQ, arXiv 2309.15505"
    cost: ClassVar[str] = "no codebook, no search; two linear maps where coordinates are fewer than dimensions"
    examples: ClassVar[dict[str, str]] = {
        "plain, own gradient": "FSQ([8, 5, 2, 3, 3, 2])",
        "mapped, own gradient": "FSQ([4, 3])",
    }

    def __init__(self, levels: list[int]) -> None:
        if not levels or any(isinstance(count, bool) or not isinstance(count, int) or count < 2 for count in levels):
            raise UserError(f"levels={levels!r}: give 2 values or more per coordinate, such as [8, 5, 5, 5]")
        super().__init__(levels)

    def _bound(self, z: Tensor) -> Tensor:
        reach_C = (self.counts_C - 1) * ((1 + MARGIN) / 2)
        offset_C = (self.counts_C % 2 == 0) * 0.5
        bounded = torch.tanh(z + torch.atanh(offset_C / reach_C)) * reach_C - offset_C
        return bounded / (self.counts_C // 2)

    def _digits(self, bounded: Tensor) -> Tensor:
        half_C = self.counts_C // 2
        return ((bounded * half_C).round().long() + half_C).clamp(min=0).minimum(self.counts_C - 1)

    def _values(self, digits: Tensor) -> Tensor:
        half_C = self.counts_C // 2
        return (digits - half_C) / half_C

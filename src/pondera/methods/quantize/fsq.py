"""FSQ: each coordinate is bounded and rounded; the codebook is all combinations.

Shapes: N vectors, C coordinates, D width. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.common.lattice import Lattice

MARGIN = 1e-3
"""How much further than the outermost values a coordinate can reach, as a share."""


class FSQ(Lattice):
    """Bounds each of C coordinates by tanh and rounds it to one of L values; a code is one of all combinations.

    There is no codebook, so none can die or crowd, and no loss but that of what reads the output.

    Source: Finite Scalar Quantization, arXiv 2309.15505, section 3.1 and appendix A.1.
    Cost: C tanh per vector, and two linear maps where C is not D.
    When not to use it: where vectors come from a model that does not learn with it (tanh bends them; use `Scalar` or a
    codebook); as `of` of a `Residual`, whose rests get smaller while the values stay as far apart.
    Resolved: the shift that makes an even number of values symmetric is atanh, so that 0 stays 0; the public code has
    tan. The margin is outwards, as inwards two values would have no shift. The gradient is that of the bounded coordinate:
    rounding passes it on, tanh does not.

    Args:
        levels: how many values each coordinate has; the paper suggests 5 or more, such as ``[8, 5, 5, 5]`` for about 2^10
            codes, ``[7, 5, 5, 5, 5]`` for 2^12, ``[8, 8, 8, 5, 5, 5]`` for 2^16.

    Example:
        >>> quantizer = FSQ([8, 5, 5, 5]).build(4)
        >>> found = quantizer(torch.tensor([0.0, 0.3, -9.0, 9.0]))
        >>> found.out.tolist(), found.codes.tolist(), quantizer.bits
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

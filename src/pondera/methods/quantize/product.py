"""Product quantization: splits a vector into parts and quantizes each part separately.

Shapes: N vectors, D width, P parts. In docstrings ``...`` are any leading dimensions, G groups, R levels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.base import Quantized, Quantizer
from pondera.methods.quantize.common.composite import Composite, merged


class Product(Composite):
    """Splits D dimensions into parts of equal width, and quantizes each part with its own quantizer.

    P codebooks of K rows represent K^P vectors at the cost of P K rows.

    Source: product quantization (Jégou et al., 2011). ConceptLM, arXiv 2602.08984, predicts next concepts in
    ``Product(SimVQ(64, hidden=...), groups=32)``; VQKV, arXiv 2603.16435, has two branches of keys.
    Cost: the sum over the parts, which run one after another; codes are P times longer.
    When not to use it: if the parts are strongly dependent, because they are coded independently; rotate them first, or
    use `Residual`.
    Resolved: every loss term is the mean over all elements of all groups; the public code of ConceptLM uses the mean in
    one place and the sum in another. Each part's gradient estimator acts on its own part.

    Args:
        of: the description of a part's quantizer.
        groups: P; must divide D.
        order: a permutation of the D dimensions, applied before the split, for parts that are not contiguous, such as
            rotary pairs; decoded vectors are in the original order. Default: ``None``, no permutation.

    Example:
        >>> from pondera.methods.quantize.vq import VQ
        >>> quantizer = Product(VQ(16), groups=2, order=[0, 2, 1, 3]).build(4)  # dimensions 0 and 2, then 1 and 3
        >>> output = quantizer(torch.randn(10, 4))
        >>> output.codes.shape, quantizer.bits, output.terms["codebook"].count
        (torch.Size([10, 2, 1]), 8, 40)
    """

    paper: ClassVar[str] = "product quantization, Jégou et al. 2011"
    cost: ClassVar[str] = "bits of all parts; encodes and decodes as one quantizer of the whole width"
    examples: ClassVar[dict[str, str]] = {
        "plain": "Product(VQ(4), groups=3, order=[5, 0, 4, 1, 3, 2])",
        "hidden": "Product(SimVQ(4, hidden=8), groups=2)",
        "of residuals": "Product(Residual(SimVQ(4), levels=3, dropout=1.0), groups=2)",
        "nested": "Product(Product(VQ(3), groups=3, order=[2, 0, 1]), groups=2, order=[1, 0, 3, 2, 5, 4])",
        "lattice, own gradient": "Product(FSQ([4, 3]), groups=3)",
        "binary": "Product(LFQ(), groups=2)",
        "of nothing": "Product(Identity(), groups=2)",
    }
    axis: ClassVar[int] = 0

    order_D: Tensor | None
    inverse_D: Tensor | None

    def __init__(self, of: Quantizer, groups: int, order: list[int] | None = None) -> None:
        super().__init__(of, groups)
        self.order = order
        if order is not None and sorted(order) != list(range(len(order))):
            raise UserError(f"order={order}: give every dimension from 0 to {len(order) - 1} exactly once")

    def _make(self) -> None:
        if self.dim % self.count:
            raise UserError(f"{self!r}: {self.count} groups do not divide the width {self.dim}")
        if self.order is not None and len(self.order) != self.dim:
            raise UserError(f"{self!r}: order has {len(self.order)} dimensions for vectors of width {self.dim}")
        order_D = None if self.order is None else torch.tensor(self.order)
        self.register_buffer("order_D", order_D, persistent=False)
        self.register_buffer("inverse_D", None if order_D is None else order_D.argsort(), persistent=False)
        self._build_parts(self.dim // self.count)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        self._expect(x, mask, levels)
        pairs = zip(self.each(), self._split(x), strict=True)
        return torch.cat([part.encode(x_part, mask, levels) for part, x_part in pairs], -2)

    def _decode_by_parts(self, codes: Tensor) -> Tensor:
        pieces = codes.split([part.groups for part in self.each()], -2)
        return self._put_back(
            torch.cat([part.decode(piece) for part, piece in zip(self.each(), pieces, strict=True)], -1)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._expect(x, mask, levels)
        outputs = [part(x_part, mask, levels) for part, x_part in zip(self.each(), self._split(x), strict=True)]
        return Quantized(
            self._put_back(torch.cat([result.out for result in outputs], -1)),
            torch.cat([result.codes for result in outputs], -2),
            merged(outputs),
            x.detach(),
            self._joint_table(result.table for result in outputs),
            self.sizes,
        )

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.order_D is None else x[..., self.order_D]
        return x.chunk(self.count, -1)

    def _put_back(self, x: Tensor) -> Tensor:
        return x if self.inverse_D is None else x[..., self.inverse_D]

    def _join(self, parts: Tensor) -> Tensor:
        """See `Quantizer._join`; each part may have several groups."""
        return self._put_back(self.each()[0]._join(parts.unflatten(-2, (self.count, -1))).flatten(-2))

"""MeanPool: every few tokens of the past as one mean row.

Shapes: B batch, H key and value heads, L tokens of a block, d head width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.memory.common.segment_layer import RecurrentState, newest
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence


class MeanPool(SegmentRecurrence):
    """Reads block by block; of closed blocks the means of every few keys and values are kept, the newest of them.

    The control for memories that compress better: as many rows, made in the simplest way.

    Source: mean pooling as in the Compressive Transformer, arXiv 1911.05507, without its uncompressed memory (that is
    `local_context`) and without its second loss. Cost: per token S further rows in attention; the cache has them once, once
    more as they were one block before, and two blocks. When not to use it: for what lies more than ``samples * pool``
    tokens back, which is forgotten.
    Resolved: keys are averaged without their rotation and are not rotated as rows, as in `ElasticMemory`, so that the two
    differ in nothing but how rows are made.

    Args:
        block: L, tokens.
        samples: S, the most rows.
        pool: tokens per row; divides the block.
        local_context: rows of the last tokens before a block, kept as they are.
        tbptt: gradients are cut at every so many-th border of blocks; none: never.
        layers: numbers of the layers that have memory; none: all without a sliding window.

    Example:
        >>> import torch
        >>> signal = torch.arange(4.0).view(1, 1, 4, 1)
        >>> MeanPool(block=4, samples=3, pool=2).update_memory({}, signal, signal, [0])["rows_v"].flatten().tolist()
        [0.5, 2.5]
    """

    paper: ClassVar[str] = "control (pooling of the Compressive Transformer, arXiv 1911.05507)"
    cost: ClassVar[str] = "1 pass; S more rows in attention; memory that does not grow"
    examples: ClassVar[dict[str, str]] = {"exact": "MeanPool(block=4, samples=3, pool=2, local_context=1)"}

    def __init__(
        self,
        block: int = 128,
        samples: int = 64,
        pool: int = 16,
        local_context: int = 0,
        tbptt: int | None = 2,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__(block, local_context, tbptt, layers)
        if samples < 1:
            raise UserError(f"samples={samples}: give 1 or more")
        if pool < 1 or block % pool:
            fitting = [number for number in range(1, block + 1) if block % number == 0]
            raise UserError(f"pool={pool}: does not divide block={block}; give one of {', '.join(map(str, fitting))}")
        self.samples, self.pool = samples, pool

    def rows(self, blocks: int) -> int:
        """See `SegmentRecurrence.rows`."""
        return min(self.samples, blocks * (self.block // self.pool))

    def update_memory(
        self, held: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """See `SegmentRecurrence.update_memory`."""
        key_BHSd, value_BHSd = (x_BHLd.unflatten(-2, (-1, self.pool)).mean(-2) for x_BHLd in (key_BHLd, value_BHLd))
        return newest(held, key_BHSd, value_BHSd, self.samples)

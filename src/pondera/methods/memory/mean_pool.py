"""MeanPool: mean-pooled keys and values of the past, a control for learned or analytic compression.

Shapes: B batch, H key and value heads, L tokens of a block, d head width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.memory.common.segment_layer import RecurrentState, newest
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence


class MeanPool(SegmentRecurrence):
    """Compresses each complete block to the means of every `pool` keys and values, and keeps the newest S means.

    It is the control for memories that compress better: the same number of slots, computed in the simplest way.

    Source: mean pooling as in the Compressive Transformer, arXiv 1911.05507, without its uncompressed memory (use
    `local_context`) and without its auxiliary loss.
    Cost: per token S extra slots in attention. The cache contains these slots, their copy before the last block (for
    rollback), and two blocks.
    When not to use it: to recall tokens more than ``samples * pool`` tokens back, which are dropped.
    Resolved: keys are averaged before RoPE, and memory slots are not rotated, as in `ElasticMemory`, so the two
    methods differ only in how memory slots are computed.

    Args:
        block: L, tokens per block.
        samples: S, maximum number of memory slots.
        pool: tokens per slot; must divide `block`.
        local_context: number of last tokens before a block whose keys and values are kept exactly.
        tbptt: gradients are cut at every `tbptt`-th block boundary; ``None``: never. Default: 2.
        layers: indices of the layers with memory; default: ``None``, all layers without a sliding window.

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
        self, state: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """See `SegmentRecurrence.update_memory`."""
        key_BHSd, value_BHSd = (x_BHLd.unflatten(-2, (-1, self.pool)).mean(-2) for x_BHLd in (key_BHLd, value_BHLd))
        return newest(state, key_BHSd, value_BHSd, self.samples)

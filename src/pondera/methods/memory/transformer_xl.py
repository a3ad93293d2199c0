"""Transformer-XL: segment-level recurrence with the cached keys and values of the last tokens before each block."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.memory.common.segment_layer import RecurrentState
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence


class TransformerXL(SegmentRecurrence):
    """Each block attends to the keys and values of the last `mems` tokens before it, without other memory.

    Source: Transformer-XL, arXiv 1901.02860.
    Cost: per token `mems` extra slots in attention; the cache contains them and two blocks, and does not grow.
    When not to use it: to recall tokens further back than layers times `mems` tokens.
    Resolved: the paper caches hidden states and recomputes keys and values from them; with the same weights and states,
    the result is the keys and values cached here. The paper's relative positions are replaced by the backbone's own:
    rotary keys are rotated to their positions before the block; learned positions remain those of the keys' own
    block. The paper stops gradients at earlier blocks, so the default of `tbptt` is 1.

    Args:
        block: L, tokens per block.
        mems: number of earlier tokens whose keys and values are kept; 0: independent blocks.
        tbptt: gradients are cut at every `tbptt`-th block boundary; ``None``: never. Default: 1.

    Example:
        >>> TransformerXL(block=64, mems=16).local_context
        16
    """

    paper: ClassVar[str] = "Transformer-XL, arXiv 1901.02860"
    cost: ClassVar[str] = "1 pass; the carried rows more in attention; memory that does not grow"
    examples: ClassVar[dict[str, str]] = {"exact": "TransformerXL(block=4, mems=3)"}

    def __init__(self, block: int = 128, mems: int = 128, tbptt: int | None = 1) -> None:
        super().__init__(block, mems, tbptt)

    def rows(self, blocks: int) -> int:
        """No memory slots, only `local_context`."""
        return 0

    def update_memory(
        self, state: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """No memory, only `local_context`."""
        return {}

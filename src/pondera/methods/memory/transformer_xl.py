"""TransformerXL: blocks, and the last rows before each carried over as they are."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.memory.common.segment_layer import RecurrentState
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence


class TransformerXL(SegmentRecurrence):
    """Reads block by block; beside each block stand the keys and values of the last tokens before it, and nothing else.

    Source: Transformer-XL, arXiv 1901.02860. Cost: per token `mems` further rows in attention; the cache has them and two
    blocks, and does not grow. When not to use it: for what lies further back than layers times `mems` tokens.
    Resolved: the paper keeps hidden states and makes keys and values of them again; with the weights of one step, and from
    the same states, these are the rows that are kept here. Its relative positions are the backbone's own: rotary keys are
    turned to their places before the block; learned positions stay as they were in their own block. It lets no gradient
    through to an earlier block, so `tbptt` is 1 unless told otherwise.

    Args:
        block: L, tokens.
        mems: rows that are carried over; 0: blocks that see nothing of what was before.
        tbptt: gradients are cut at every so many-th border of blocks; none: never.

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
        """None beside those that are carried over."""
        return 0

    def update_memory(
        self, held: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """Nothing beside the rows that are carried over."""
        return {}

"""MemorizingTransformer: closed blocks as they were, of which each query reads its nearest rows.

Shapes: B batch, S rows of a call, M memory rows, K memory and other rows, L tokens of a block, H heads, G key and value
heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pondera.cache.attention import Attention, Server
from pondera.core.errors import UserError
from pondera.cost.model import MatMul
from pondera.methods.memory.common.segment_cache import SegmentCache
from pondera.methods.memory.common.segment_layer import RecurrentState, SegmentLayer, newest
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence
from pondera.models.backbone import Backbone
from pondera.models.rotary import Rotary


class MemorizingTransformer(SegmentRecurrence):
    """Reads block by block; in some layers each query also attends to its k nearest among the last M keys before the block.

    What comes of these k and what comes of the block are mixed by a learned gate, one per head.

    Source: Memorizing Transformers, arXiv 2203.08913. Cost: in layers with memory 2 M rows of d numbers per head, once more
    as they were one block before. The search is exact, by one product of all queries and all M keys: H d M multiplications
    per token, and as many again to mix all M columns, most of them with weight 0, so what reading k rows alone could
    save is not saved. That is what attention to M further rows costs in one layer, and fine while full attention to as many
    would be: with M = 1024 at width 512, a third of what the layer's matrices multiply. An index for approximate search pays
    where M is some 10^5 and more; what it misses has to be measured then.
    When not to use it: with a memory as large as that.
    Resolved: keys are kept without positions, and queries are compared without theirs, as the paper has positions in its
    local attention only. No gradient goes into memory. The paper normalises queries and keys; here they are what the
    architecture makes them. It has memory in one layer, near the top, of its twelve; `layers` says which, and without
    it is the last one without a sliding window. Gates start at one half. Its Transformer-XL rows are `local_context`.

    Args:
        block: L, tokens.
        memory: M, the most rows that are kept.
        top_k: k, rows that a query reads.
        local_context: rows of the last tokens before a block, beside it in its own softmax.
        layers: numbers of the layers that have memory; none: the last one without a sliding window.

    Example:
        >>> MemorizingTransformer(block=64, memory=256).rows(blocks=3)
        192
    """

    paper: ClassVar[str] = "Memorizing Transformers, arXiv 2203.08913"
    cost: ClassVar[str] = "1 pass; in one layer scores of M more rows; memory that does not grow"
    examples: ClassVar[dict[str, str]] = {"exact": "MemorizingTransformer(block=4, memory=10, top_k=3)"}

    def __init__(
        self,
        block: int = 128,
        memory: int = 1024,
        top_k: int = 32,
        local_context: int = 0,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__(block, local_context, 1, layers)
        for name, value in (("memory", memory), ("top_k", top_k)):
            if value < 1:
                raise UserError(f"{name}={value}: give 1 or more")
        self.memory, self.top_k = memory, top_k

    def bind(self, backbone: Backbone) -> None:
        """Makes the gates."""
        if self.layers is None:
            full = [index for index, kind in enumerate(backbone.layer_types) if kind == "full_attention"]
            self.layers = full[-1:] or None
        super().bind(backbone)
        first, heads = next(backbone.lm.parameters()), backbone.config.num_attention_heads
        count = len(cast("list[int]", self.layers))
        self.gates = nn.Parameter(torch.zeros(count, heads, dtype=first.dtype, device=first.device))

    def rows(self, blocks: int) -> int:
        """See `SegmentRecurrence.rows`."""
        return min(self.memory, blocks * self.block)

    def update_memory(
        self, held: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """See `SegmentRecurrence.update_memory`."""
        return newest(held, key_BHLd, value_BHLd, self.memory)

    def attention(self, backbone: Backbone, held: SegmentCache, h_ASD: Tensor, position_AS: Tensor) -> Server:
        """See `SegmentRecurrence.attention`."""
        layers = cast("list[int]", self.layers)
        width = cast(SegmentLayer, held.layers[layers[0]]).widths()[0]
        gates = dict(zip(layers, self.gates, strict=True))
        rotation = backbone.rotation("full_attention", position_AS, h_ASD)
        return partial(nearest_attention, Nearest(gates, width, self.top_k, rotation))

    def attended(self, blocks: int) -> int:
        """See `SegmentRecurrence.attended`: memory is read beside the backbone's attention."""
        return 0

    def searches(self, rows: float, blocks: int, gradient: bool = False) -> list[MatMul]:
        """See `SegmentRecurrence.searches`: scores and their mix, and back to the queries alone."""
        if self.shape is None or not blocks:
            return []
        products = 2 * (1 + gradient)
        return [MatMul(products * rows, self.shape.query_numbers * self.rows(blocks), trained=False)]


@dataclass(frozen=True)
class Nearest:
    """What the attention of one call is told.

    Args:
        gates: of each layer that has memory, ``[H]`` each.
        width: M, memory columns in these layers.
        top_k: k.
        rotation: what queries are turned by; none: nothing.
    """

    gates: dict[int, Tensor]
    width: int
    top_k: int
    rotation: Rotary | None

    def __call__(
        self, query_BHSd: Tensor, key_BGMd: Tensor, value_BGMd: Tensor, there_B1SM: Tensor, scale: float
    ) -> Tensor:
        """What each query reads of memory, ``[B, S, H, d]``."""
        query = query_BHSd if self.rotation is None else self.rotation.undo(query_BHSd)
        groups = query.shape[1] // key_BGMd.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key_BGMd, value_BGMd))
        score_BHSM = (query @ key.transpose(-1, -2) * scale).masked_fill(~there_B1SM, -torch.inf)
        if self.top_k < self.width:
            # By number, not by score: of rows that are equal, as the same token at the beginning of two blocks is, any may
            # be the k-th, but there must be k, or rounding would say how often an equal row counts.
            nearest_BHSk = score_BHSM.topk(self.top_k, dim=-1).indices
            others_BHSM = torch.ones_like(score_BHSM, dtype=torch.bool).scatter(-1, nearest_BHSk, False)
            score_BHSM = score_BHSM.masked_fill(others_BHSM, -torch.inf)
        weight_BHSM = score_BHSM.float().softmax(-1).nan_to_num().to(value.dtype)  # nothing where there is nothing
        return (weight_BHSM @ value).transpose(1, 2)


def nearest_attention(
    nearest: Nearest,
    base: Attention,
    module: Any,
    query_BHSd: Tensor,
    key_BGKd: Tensor,
    value_BGKd: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The backbone's own attention to all rows but memory's, and the nearest of these, mixed by the layer's gates.

    Args:
        nearest: reads memory.
        base: the backbone's own attention function.
        module: the attention layer.
        query_BHSd, key_BGKd, value_BGKd: after rotation, but for memory rows, which come first.
        attention_mask: ``[B, 1, S, K]`` for layers with memory, as `base` takes it.
        scaling: of the scores; none: one over the root of the width.
        **kwargs: handed on.
    """
    gate_H = nearest.gates.get(module.layer_idx)
    width = 0 if gate_H is None else nearest.width
    local = attention_mask[..., attention_mask.shape[-1] - key_BGKd.shape[-2] + width :]
    key, value = key_BGKd[:, :, width:], value_BGKd[:, :, width:]
    out_BSHd, _ = base(module, query_BHSd, key, value, local, scaling=scaling, **kwargs)
    if gate_H is None or not width:
        return out_BSHd, None
    there = attention_mask[..., :width]
    there = there if there.dtype == torch.bool else there == 0
    scale = query_BHSd.shape[-1] ** -0.5 if scaling is None else scaling
    read_BSHd = nearest(query_BHSd, key_BGKd[:, :, :width], value_BGKd[:, :, :width], there, scale)
    gate = gate_H.sigmoid()[:, None] * there.any(-1).transpose(1, 2)[..., None]
    return out_BSHd + gate * (read_BSHd - out_BSHd), None

"""Memorizing Transformer: attention to the nearest keys in an uncompressed memory of earlier blocks.

Shapes: B batch, S tokens of a call, M memory slots, K memory and other slots, L tokens of a block, H heads, G key and
value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pondera.cache.attention import Attention, Server
from pondera.core.errors import UserError
from pondera.cost.schedule import MatMul
from pondera.methods.memory.common.segment_cache import SegmentCache
from pondera.methods.memory.common.segment_layer import RecurrentState, SegmentLayer, newest
from pondera.methods.memory.common.segment_recurrence import SegmentRecurrence
from pondera.models.backbone import Backbone
from pondera.models.rotary import Rotary


class MemorizingTransformer(SegmentRecurrence):
    """In some layers, each query also attends to its k nearest keys among the last M keys before the block.

    A learned gate per head mixes this result with the attention to the block.

    Source: Memorizing Transformers, arXiv 2203.08913.
    Cost: layers with memory keep 2 M vectors of d numbers per head, plus a copy from before the last block (for
    rollback). The search is exact, one product of all queries with all M keys: H d M multiplications per token, and the
    same again to mix all M columns, most of them with weight 0. Reading only k slots would be cheaper, but this
    implementation does not exploit that. The cost is that of attention to M extra slots in one layer, which is
    acceptable for moderate M: M = 1024 at width 512 costs a third of the layer's matrix products. An index for
    approximate search pays off from about M = 10^5; its recall must then be measured.
    When not to use it: with a memory of that size.
    Resolved: keys are stored without positions, and queries are compared without positions, because the paper has
    positions only in local attention. Memory gets no gradient. The paper normalizes queries and keys; here they are as
    the architecture computes them. The paper has memory in one of its twelve layers, near the top; `layers` selects the
    layers, and the default is the last layer without a sliding window. Gates start at one half. The Transformer-XL
    cache of the paper is `local_context`.

    Args:
        block: L, tokens per block.
        memory: M, maximum number of memory slots.
        top_k: k, memory slots that a query attends to.
        local_context: number of last tokens before a block that share a softmax with the block.
        layers: indices of the layers with memory; default: ``None``, the last layer without a sliding window.

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
        """Creates the gates."""
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
        self, state: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """See `SegmentRecurrence.update_memory`."""
        return newest(state, key_BHLd, value_BHLd, self.memory)

    def attention(self, backbone: Backbone, cache: SegmentCache, h_ASD: Tensor, position_AS: Tensor) -> Server:
        """See `SegmentRecurrence.attention`."""
        layers = cast("list[int]", self.layers)
        width = cast(SegmentLayer, cache.layers[layers[0]]).widths()[0]
        gates = dict(zip(layers, self.gates, strict=True))
        rotation = backbone.rotation("full_attention", position_AS, h_ASD)
        return partial(nearest_attention, Nearest(gates, width, self.top_k, rotation))

    def attended(self, blocks: int) -> int:
        """See `SegmentRecurrence.attended`: memory is not part of the backbone's own attention."""
        return 0

    def searches(self, rows: float, blocks: int, gradient: bool = False) -> list[MatMul]:
        """See `SegmentRecurrence.searches`: products for scores and their mix; gradients reach only the queries."""
        if self.shape is None or not blocks:
            return []
        products = 2 * (1 + gradient)
        return [MatMul(products * rows, self.shape.query_numbers * self.rows(blocks), trained=False)]


@dataclass(frozen=True)
class Nearest:
    """Memory attention of one call.

    Args:
        gates: gate logits of each layer with memory, ``[H]`` each.
        width: M, memory columns in these layers.
        top_k: k.
        rotation: the rotary embedding of the queries, which is undone; ``None``: no rotary embedding.
    """

    gates: dict[int, Tensor]
    width: int
    top_k: int
    rotation: Rotary | None

    def __call__(
        self, query_BHSd: Tensor, key_BGMd: Tensor, value_BGMd: Tensor, there_B1SM: Tensor, scale: float
    ) -> Tensor:
        """The memory attention output of each query, ``[B, S, H, d]``."""
        query = query_BHSd if self.rotation is None else self.rotation.undo(query_BHSd)
        groups = query.shape[1] // key_BGMd.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key_BGMd, value_BGMd))
        score_BHSM = (query @ key.transpose(-1, -2) * scale).masked_fill(~there_B1SM, -torch.inf)
        if self.top_k < self.width:
            # Select by index, not by a score threshold. Slots can have equal keys (e.g. the same token at the start of
            # two blocks); exactly k of them must be selected, or rounding would decide how many equal slots count.
            nearest_BHSk = score_BHSM.topk(self.top_k, dim=-1).indices
            others_BHSM = torch.ones_like(score_BHSM, dtype=torch.bool).scatter(-1, nearest_BHSk, False)
            score_BHSM = score_BHSM.masked_fill(others_BHSM, -torch.inf)
        weight_BHSM = score_BHSM.float().softmax(-1).nan_to_num().to(value.dtype)  # zero without valid slots
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
    """The backbone's own attention to all slots except memory, mixed with memory attention by the layer's gates.

    Args:
        nearest: computes memory attention.
        base: the backbone's own attention function.
        module: the attention layer.
        query_BHSd, key_BGKd, value_BGKd: after RoPE, except memory slots, which come first.
        attention_mask: ``[B, 1, S, K]`` for layers with memory, in the format of `base`.
        scaling: scale of the scores; default: ``None``, d ** -0.5.
        **kwargs: passed to `base`.
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

"""RefreshKV: attention to a part of the past, which a look at all of it renews now and then.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation, grouped
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.budget import SlotBudget
from pondera.methods.kv_cache.common.policy import Policy, highest
from pondera.methods.kv_cache.common.pooling import check_pool, pooled


class RefreshKV(Policy):
    """Keeps everything; attends to the tokens that the last full look found best and those that came since.

    Every `stride` steps each layer compares its query with that of its last full look. Where it has drifted, the step looks at
    all tokens, and the part is chosen anew from the weights; otherwise the layer goes on with its part.

    Source: Xu et al., RefreshKV (formerly Recycled Attention), arXiv 2411.05787.
    Cost: all rows stay, and one float per slot. A step attends to `part` rows, which are copied out; a full look attends to
    all, and takes the product of its query and the keys a second time.
    When not to use it: to save memory.
    Resolved: the part is the slots with the highest pooled weights of the last full look, and tokens that came since rank above
    all; that is the same as to drop the lowest for each token that comes. Weights are pooled along the text for each query
    head; the largest of the heads of a KV head counts. The share is of the prompt. Every text of a batch has its own steps.
    Calls of several tokens look at everything; of these only a prompt chooses the part, drafts do not.

    Args:
        part: rows attended to, per layer and KV head: a number, or a share of the prompt.
        stride: steps between comparisons.
        similarity: cosine of the queries below which a full look is due; above 1: always. The authors take 0.85 for Llama 3.1
            8B and 0.95 for Qwen2 7B.
        kernel: neighbours that are pooled, an odd number.

    Example:
        >>> RefreshKV(part=4096).stride
        10
    """

    paper: ClassVar[str] = "RefreshKV, arXiv 2411.05787"
    cost: ClassVar[str] = "one row per token and a float; attention over part of them in most steps"
    examples: ClassVar[dict[str, str]] = {"exact": "RefreshKV(64)", "tight": "RefreshKV(5, stride=2, kernel=3)"}
    saves: ClassVar[str] = "reading"
    sparse_attention: bool = True
    observation_window: int = 1

    def __init__(self, part: int | float = 0.125, stride: int = 10, similarity: float = 0.85, kernel: int = 7) -> None:
        super().__init__()
        check_pool(kernel, "max")
        if stride < 1:
            raise UserError(f"stride={stride}: give a number of steps, 1 or more")
        self.part, self.stride, self.similarity, self.kernel = SlotBudget(part), stride, similarity, kernel

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: a new token ranks above all until the next full look."""
        return {"rank": torch.inf}

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """See `Policy.select_kv`."""
        looks_B = self._looks(layer, query_BGRTD, call.start + call.tokens)
        tokens = layer.real_tokens(budget_from_prompt=True)
        part_B = torch.tensor([self.part.slots(0, [0], count, 1, 1)[0] for count in tokens], device=looks_B.device)
        count_BG = table.real.sum(-1)
        due_BG = torch.where(looks_B[:, None], count_BG, count_BG.minimum(part_B[:, None]))
        if call.tokens > 1 or bool((due_BG == count_BG).all()):
            return None
        rank_BGS = table.note("rank").masked_fill(~table.real, -torch.inf)
        slot_BGk, kept_BGk = highest(rank_BGS, table.position, due_BG)
        return torch.where(kept_BGk, slot_BGk, -1)

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        if call.tokens > 1:
            return int(layer.at_prompt)
        query_BGRTD = grouped(call.query_BHTD, call.key_BGTD.shape[1])
        return int(self._looks(layer, query_BGRTD, call.start + 1).any())

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: the weights of a full look choose the part."""
        tokens = int(seen.number_T[-1]) + 1
        looks_B = self._looks(layer, seen.query_BGRTD, tokens) & seen.real_BT[:, -1]
        rank_BGS = pooled(seen.weight_BGRTS[:, :, :, -1], table.position, self.kernel, "max").amax(2)
        note_BGS = table.note("rank")
        note_BGS.copy_(torch.where(looks_B[:, None, None], rank_BGS, note_BGS))
        query_BD = _mean_query(seen.query_BGRTD)
        layer.state["query"] = torch.where(looks_B[:, None], query_BD, layer.state.get("query", query_BD))
        never_B = torch.full_like(layer.state["padding"], -1)
        layer.state["looked"] = torch.where(looks_B, tokens, layer.state.get("looked", never_B))

    def _looks(self, layer: KVStoreLayer, query_BGRTD: Tensor, tokens: int) -> Tensor:
        """``[B]``: which texts look at everything in the step that is the last of so many tokens."""
        if "looked" not in layer.state or tokens == layer.prompt:
            return torch.ones(len(query_BGRTD), dtype=torch.bool, device=query_BGRTD.device)
        looked_B = layer.state["looked"]
        drifted_B = F.cosine_similarity(_mean_query(query_BGRTD), layer.state["query"], dim=-1) < self.similarity
        return (looked_B < 0) | (((tokens - looked_B) % self.stride == 0) & drifted_B)


def _mean_query(query_BGRTD: Tensor) -> Tensor:
    """``[B, D]``: the last query, over heads."""
    return query_BGRTD[:, :, :, -1].flatten(1, 2).mean(1)

"""RefreshKV: attention to a subset of the KV cache, refreshed by occasional full attention.

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
    """Sparse attention to a subset of the KV cache, refreshed by occasional full attention.

    The method keeps all tokens. A step attends to the highest-scoring tokens of the last full attention step and to all
    later ones. Every `stride` steps each layer compares its query with that of the last full attention step. If the
    query has drifted, the step attends to all tokens and its weights select a new subset; otherwise the layer keeps its
    subset.

    Source: Xu et al., RefreshKV (formerly Recycled Attention), arXiv 2411.05787.
    Cost: all KV slots stay, with one float each. A step copies `part` of them and attends to the copy; a full step
    attends to all, and computes the product of its query and the keys a second time.
    When not to use it: to save memory.
    Resolved: the subset is the slots with the highest pooled weights of the last full step, and later tokens rank above
    all; this equals dropping the lowest slot for each new token. The method pools weights along the sequence for each
    query head, and takes the maximum over the query heads of a KV head. A share is a share of the prompt. Each sequence
    of a batch has its own refresh steps. Calls of several tokens attend to everything; only the prompt selects a
    subset, not draft tokens.

    Args:
        part: size of the subset per layer and KV head, as a number of tokens or a share of the prompt.
        stride: number of steps between comparisons.
        similarity: cosine of the queries below which a full step follows; above 1: always. The authors use 0.85 for
            Llama 3.1 8B and 0.95 for Qwen2 7B.
        kernel: pooling width in tokens, an odd number.

    Example:
        >>> RefreshKV(part=4096).stride
        10
    """

    paper: ClassVar[str] = "RefreshKV, arXiv 2411.05787"
    cost: ClassVar[str] = "one KV slot and a float per token; most steps attend to a part of them"
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
        """See `Policy.note_defaults`: a new token ranks above all others until the next full step."""
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
        rank_BGS = table.note["rank"].masked_fill(~table.real, -torch.inf)
        slot_BGk, kept_BGk = highest(rank_BGS, table.position, due_BG)
        return torch.where(kept_BGk, slot_BGk, -1)

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        if call.tokens > 1:
            return int(layer.at_prompt)
        query_BGRTD = grouped(call.query_BHTD, call.key_BGTD.shape[1])
        return int(self._looks(layer, query_BGRTD, call.start + 1).any())

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: the weights of a full step select the subset."""
        tokens = int(seen.number_T[-1]) + 1
        looks_B = self._looks(layer, seen.query_BGRTD, tokens) & seen.real_BT[:, -1]
        rank_BGS = pooled(seen.weight_BGRTS[:, :, :, -1], table.position, self.kernel, "max").amax(2)
        note_BGS = table.note["rank"]
        note_BGS.copy_(torch.where(looks_B[:, None, None], rank_BGS, note_BGS))
        query_BD = _mean_query(seen.query_BGRTD)
        layer.state["query"] = torch.where(looks_B[:, None], query_BD, layer.state.get("query", query_BD))
        never_B = torch.full_like(layer.state["padding"], -1)
        layer.state["looked"] = torch.where(looks_B, tokens, layer.state.get("looked", never_B))

    def _looks(self, layer: KVStoreLayer, query_BGRTD: Tensor, tokens: int) -> Tensor:
        """``[B]``: which sequences attend to everything in the step that ends after `tokens` tokens."""
        if "looked" not in layer.state or tokens == layer.prompt:
            return torch.ones(len(query_BGRTD), dtype=torch.bool, device=query_BGRTD.device)
        looked_B = layer.state["looked"]
        drifted_B = F.cosine_similarity(_mean_query(query_BGRTD), layer.state["query"], dim=-1) < self.similarity
        return (looked_B < 0) | (((tokens - looked_B) % self.stride == 0) & drifted_B)


def _mean_query(query_BGRTD: Tensor) -> Tensor:
    """``[B, D]``: the last query, averaged over heads."""
    return query_BGRTD[:, :, :, -1].flatten(1, 2).mean(1)

"""TreeKV: smooth eviction by competition between neighboring tokens, as in a tree.

Shapes: B batch, G KV heads, S slots, C slots of a full cache and the new token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import ALL, BudgetedPolicy, evict_lowest


class TreeKV(BudgetedPolicy):
    """Smooth eviction as in a tree: pairs of neighboring tokens compete, and the pair cycles through the cache.

    When the cache is full, each new token evicts one of a pair of neighbors. The policy evicts the slot of the pair
    with the lower mean attention. The pair moves through the cache from old to new and restarts at its end, so each
    sweep thins out the result of the previous one: old regions become sparser, like levels of a tree, but none
    disappears as a whole.

    Source: He et al., TreeKV: smooth key-value cache compression with tree structures, arXiv 2501.04987.
    Cost: a second product of queries and keys in prefill, as `H2O`; one float per KV slot. A prompt longer than the
    budget needs a short step for each token beyond it.
    When not to use it: if a few distant tokens matter very much: a token competes with its neighbor, not with all
    tokens.
    Resolved: mean attention is the sum over queries and the query heads of a KV head, divided by the number of queries
    since the token. The paper leaves open where the pair starts (here: at the oldest unprotected slot), whether heads
    share it (here: each KV head of each sequence has its own, and all move alike), and how to treat sinks and recent
    tokens (here: `sinks` and `recent` never compete; 4 and 1). Prefill evicts as if its tokens arrived one by one, but
    with the attention of the whole chunk that the call computed; so the kept tokens depend on the chunks. If the slots
    of a pair have equal means, the policy evicts the older.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        sinks: number of first tokens that are never evicted.
        recent: number of latest tokens that are never evicted.

    Example:
        >>> TreeKV(budget=1024).sinks
        4
    """

    paper: ClassVar[str] = "TreeKV, arXiv 2501.04987"
    cost: ClassVar[str] = "budget KV slots and one float each; a second product of queries and keys in prefill"
    examples: ClassVar[dict[str, str]] = {"exact": "TreeKV(64)", "tight": "TreeKV(8, sinks=1, recent=2)"}
    observation_window: int = ALL

    def __init__(self, budget: int | float | str | list = 1024, sinks: int = 4, recent: int = 1) -> None:
        if isinstance(recent, float) or recent < 1:
            raise UserError(f"recent={recent!r}: give a number of tokens, 1 or more")
        super().__init__(budget, sinks, recent, least=sinks + recent + 1)

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        table.note["received"].add_(seen.received_BGS)

    def evict_over_budget(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor, over_BG: Tensor) -> None:
        """See `BudgetedPolicy.evict_over_budget`."""
        position_BGS, real_BGS = table.position, table.real
        mean_BGS = table.note["received"] / (layer.seen - position_BGS).clamp(min=1)
        # Slots in the order of the sequence, empty slots last.
        order_BGS = position_BGS.masked_fill(~real_BGS, torch.iinfo(position_BGS.dtype).max).argsort(dim=-1)
        count_BG, pair_BG = real_BGS.sum(-1), self._pair(layer)[:, table.part]
        kept_BGC, pair_BG = compete(order_BGS, mean_BGS, count_BG, limit_BG, pair_BG, self.sinks, int(self.recent))
        layer.state["pair"][:, table.part] = pair_BG
        rank_C = torch.arange(kept_BGC.shape[2], device=kept_BGC.device)
        stays_BGC = rank_C < limit_BG.minimum(count_BG)[..., None]
        stays_BGS = torch.zeros_like(mean_BGS).scatter(2, kept_BGC, stays_BGC.to(mean_BGS.dtype))
        evict_lowest(table, stays_BGS.masked_fill(~real_BGS, -torch.inf), over_BG)

    def _pair(self, layer: KVStoreLayer) -> Tensor:
        """``[B, G]``: rank in the sequence of the older slot of the next pair, for all heads of the layer."""
        if "pair" not in layer.state:
            padding_B = layer.state["padding"]
            heads = sum(len(table.heads) for table in layer.tables)
            layer.state["pair"] = padding_B.new_full((len(padding_B), heads), self.sinks)
        return layer.state["pair"]


def compete(
    order_BGS: Tensor, mean_BGS: Tensor, count_BG: Tensor, limit_BG: Tensor, pair_BG: Tensor, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Adds the tokens beyond the limit one by one, and evicts one of a pair of neighbors for each.

    Args:
        order_BGS: the slots in the order of the sequence.
        mean_BGS: mean attention of each slot.
        count_BG: number of slots with a token.
        limit_BG: number of slots that may stay.
        pair_BG: rank of the first pair.
        sinks, recent: number of oldest and of latest slots that do not compete.

    Returns:
        The slots that stay, in the order of the sequence (the first ``min(count, limit)`` of each row), and the rank of
        the next pair.
    """
    steps_BG = (count_BG - limit_BG).clamp(min=0)
    kept_BGC = order_BGS[..., : int(limit_BG.minimum(count_BG).amax()) + 1]
    rank_C = torch.arange(kept_BGC.shape[2], device=kept_BGC.device)
    at_BG1, limit_BG1 = pair_BG[..., None], limit_BG[..., None]
    for step in range(int(steps_BG.amax())):
        due_BG1 = (step < steps_BG)[..., None]
        new_BG1 = order_BGS.gather(2, (limit_BG1 + step).clamp(max=order_BGS.shape[2] - 1))
        kept_BGC = torch.where(due_BG1 & (rank_C == limit_BG1), new_BG1, kept_BGC)
        pair_BG2 = kept_BGC.gather(2, torch.cat([at_BG1, at_BG1 + 1], dim=2).clamp(max=len(rank_C) - 1))
        older_BG1, newer_BG1 = mean_BGS.gather(2, pair_BG2).split(1, dim=2)
        lost_BG1 = at_BG1 + (older_BG1 > newer_BG1)
        closed_BGC = kept_BGC.gather(2, (rank_C + (rank_C >= lost_BG1)).clamp(max=len(rank_C) - 1))
        kept_BGC = torch.where(due_BG1, closed_BGC, kept_BGC)
        next_BG1 = torch.where(at_BG1 + 1 >= limit_BG1 - recent, sinks, at_BG1 + 1)
        at_BG1 = torch.where(due_BG1, next_BG1, at_BG1)
    return kept_BGC, at_BG1[..., 0]

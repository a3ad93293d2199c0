"""TreeKV: neighbours compete in pairs, so that the past thins out smoothly.

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
    """When the cache is full, each new token has one pair of neighbours compete, and the next token the next pair.

    Of the pair the slot with the lower mean attention is forgotten. The pair moves through the cache from old to new and
    begins again at its end, so each sweep thins what the last one left: old regions get sparser, like levels of a tree, and
    none is lost as a whole.

    Source: He et al., TreeKV: smooth key-value cache compression with tree structures, arXiv 2501.04987.
    Cost: a second product of queries and keys in the prompt as `H2O`; one float per slot. A prompt longer than the budget
    takes a short step for each token beyond it.
    When not to use it: where few, far tokens matter very much: a pair is deferred by itself, not against the whole cache.
    Resolved: mean attention is the sum over queries and the query heads of a KV head, divided by the queries since the token
    came. The paper leaves open where the pair begins (at the oldest slot that is not protected), whether heads share it (each
    KV head of each text has its own; they move alike), and what it says of sinks and recent tokens (`sinks` and `recent` never
    compete; 4 and 1). A prompt is competed over as if its tokens had come one by one, but with the attention of the whole
    piece that they came in, since that is what was computed; so the kept set depends on the pieces. Where slots of a pair
    are equal, the older is forgotten.

    Args:
        budget: slots per layer and KV head; see `BudgetedPolicy`.
        sinks: first tokens that are never forgotten.
        recent: the latest tokens that are never forgotten.

    Example:
        >>> TreeKV(budget=1024).sinks
        4
    """

    paper: ClassVar[str] = "TreeKV, arXiv 2501.04987"
    cost: ClassVar[str] = "budget rows and one float each; a second product of queries and keys in the prompt"
    examples: ClassVar[dict[str, str]] = {"exact": "TreeKV(64)", "tight": "TreeKV(8, sinks=1, recent=2)"}
    observation_window: int = ALL

    def __init__(self, budget: int | float | str | list = 1024, sinks: int = 4, recent: int = 1) -> None:
        if isinstance(recent, float) or recent < 1:
            raise UserError(f"recent={recent!r}: give a number of tokens, 1 or more")
        super().__init__(budget, sinks, recent, least=sinks + recent + 1)

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Slots.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Slots.observe`."""
        table.note("received").add_(seen.weight_BGRTS.sum((2, 3)))

    def evict_over_budget(
        self, layer: KVStoreLayer, table: KVStore, heads: list[int], limit_BG: Tensor, over_BG: Tensor
    ) -> None:
        """See `BudgetedPolicy.evict_over_budget`."""
        position_BGS, real_BGS = table.position, table.real
        mean_BGS = table.note("received") / (layer.seen - position_BGS).clamp(min=1)
        # Slots in the order of the text, those that hold a token first.
        order_BGS = position_BGS.masked_fill(~real_BGS, torch.iinfo(position_BGS.dtype).max).argsort(dim=-1)
        count_BG, pair_BG = real_BGS.sum(-1), self._pair(layer)[:, heads]
        held_BGC, pair_BG = compete(order_BGS, mean_BGS, count_BG, limit_BG, pair_BG, self.sinks, int(self.recent))
        layer.state["pair"][:, heads] = pair_BG
        rank_C = torch.arange(held_BGC.shape[2], device=held_BGC.device)
        stays_BGC = rank_C < limit_BG.minimum(count_BG)[..., None]
        stays_BGS = torch.zeros_like(mean_BGS).scatter(2, held_BGC, stays_BGC.to(mean_BGS.dtype))
        evict_lowest(table, stays_BGS.masked_fill(~real_BGS, -torch.inf), over_BG)

    def _pair(self, layer: KVStoreLayer) -> Tensor:
        """``[B, G]``: the older slot of the pair that competes next, by its rank in the text; of all heads of the layer."""
        if "pair" not in layer.state:
            padding_B = layer.state["padding"]
            layer.state["pair"] = padding_B.new_full((len(padding_B), len(layer.heads(slice(None)))), self.sinks)
        return layer.state["pair"]


def compete(
    order_BGS: Tensor, mean_BGS: Tensor, count_BG: Tensor, limit_BG: Tensor, pair_BG: Tensor, sinks: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Lets tokens beyond the limit come one by one, and one pair of neighbours compete for each.

    Args:
        order_BGS: the slots in the order of the text.
        mean_BGS: what they are deferred by.
        count_BG: how many of them there are.
        limit_BG: how many may stay.
        pair_BG: where the first pair stands.
        sinks, recent: how many of the oldest and of the latest slots do not compete.

    Returns:
        The slots that stay, in the order of the text, the first ``min(count, limit)`` of each row; where the next pair stands.
    """
    steps_BG = (count_BG - limit_BG).clamp(min=0)
    held_BGC = order_BGS[..., : int(limit_BG.minimum(count_BG).amax()) + 1]
    rank_C = torch.arange(held_BGC.shape[2], device=held_BGC.device)
    at_BG1, limit_BG1 = pair_BG[..., None], limit_BG[..., None]
    for step in range(int(steps_BG.amax())):
        due_BG1 = (step < steps_BG)[..., None]
        new_BG1 = order_BGS.gather(2, (limit_BG1 + step).clamp(max=order_BGS.shape[2] - 1))
        held_BGC = torch.where(due_BG1 & (rank_C == limit_BG1), new_BG1, held_BGC)
        pair_BG2 = held_BGC.gather(2, torch.cat([at_BG1, at_BG1 + 1], dim=2).clamp(max=len(rank_C) - 1))
        older_BG1, newer_BG1 = mean_BGS.gather(2, pair_BG2).split(1, dim=2)
        lost_BG1 = at_BG1 + (older_BG1 > newer_BG1)
        closed_BGC = held_BGC.gather(2, (rank_C + (rank_C >= lost_BG1)).clamp(max=len(rank_C) - 1))
        held_BGC = torch.where(due_BG1, closed_BGC, held_BGC)
        next_BG1 = torch.where(at_BG1 + 1 >= limit_BG1 - recent, sinks, at_BG1 + 1)
        at_BG1 = torch.where(due_BG1, next_BG1, at_BG1)
    return held_BGC, at_BG1[..., 0]

"""AdaKV: adaptive budget allocation among the KV heads of a layer.

Shapes: B batch, G KV heads, S slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.kv_store import EMPTY
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.policy import EvictionPolicy, evict_lowest, highest
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.snap_kv import SnapKV


class AdaKV(PolicyWrapper):
    """Adaptive budget allocation among KV heads, for any eviction policy.

    The KV heads of a layer share one budget, and the highest scores of all heads together keep their slots. A head with
    concentrated attention leaves KV slots to a head with dispersed attention. Each head keeps at least the share
    `safeguard` of the uniform budget. Each KV head has its own storage, so eviction frees memory.

    Source: Feng et al., Ada-KV, arXiv 2407.11550.
    Cost: as the policy's, and a sort over all heads. Attention runs head by head. Before the first
    eviction, every call concatenates the keys and values of the heads.
    When not to use it: on models with one or two KV heads; around policies whose scores cannot be compared across heads
    (`StreamingLLM`, `RandomEviction`): they gain nothing.
    Resolved: as in the authors' code, heads are KV heads, and the method allocates the safeguard first; among equal
    scores the newer token wins. A policy that evicts in decoding allocates the budget again for each token. The storage
    of a batch is as wide as its widest batch row.

    Args:
        policy: an eviction policy, whose budget is the uniform budget of each head; default: ``SnapKV()``.
        safeguard: minimum share of the uniform budget that each head keeps, from 0 to 1; 1 is the policy alone.

    Example:
        >>> AdaKV(SnapKV(512), safeguard=0.2).by_head
        True
    """

    paper: ClassVar[str] = "Ada-KV, arXiv 2407.11550"
    cost: ClassVar[str] = "the policy's KV slots, shared among heads; attention head by head"
    examples: ClassVar[dict[str, str]] = {
        "exact": "AdaKV(SnapKV(64, window=4))",
        "tight": "AdaKV(SnapKV(8, window=3, kernel=3), safeguard=0.3)",
        "exact-decoding": "AdaKV(H2O(64))",
        "tight-decoding": "AdaKV(H2O(5, recent=2), safeguard=0.3)",
    }
    policy: EvictionPolicy

    def __init__(self, policy: KVCacheMethod | None = None, safeguard: float = 0.2) -> None:
        policy = SnapKV() if policy is None else policy
        if not isinstance(policy, EvictionPolicy) or policy.by_head:
            raise UserError(
                f"AdaKV({type(policy).__name__}(...)): give a policy that ranks tokens within one budget for all "
                "heads, e.g. AdaKV(SnapKV(512))"
            )
        if not 0 <= safeguard <= 1:
            raise UserError(
                f"safeguard={safeguard}: give the minimum share of the uniform budget per head, from 0 to 1"
            )
        super().__init__(policy)
        self.safeguard = safeguard

    @property
    def by_head(self) -> bool:
        """See `Policy.by_head`."""
        return True

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """See `Policy.evict_layer`."""
        if self.policy.prefill_only and not layer.at_prompt:
            return
        tables, heads = layer.tables, list(range(len(layer.tables)))
        count_BG = torch.cat([table.real.sum(-1) for table in tables], dim=1)
        even_BG = self.policy.slots(layer, tables[0], heads)
        if int((count_BG.sum(-1) - even_BG.sum(-1)).amax()) < self.policy.slack:
            return
        protected_score = [
            self.policy.protected_score(layer, table, even_BG[:, [head]]) for head, table in enumerate(tables)
        ]
        most = max(table.used for table in tables)
        protected_score_BGS = torch.cat(
            [F.pad(one, (0, most - one.shape[2]), value=-torch.inf) for one in protected_score], dim=1
        )
        position = [F.pad(table.position, (0, most - table.used), value=EMPTY) for table in tables]
        share_BG = shares(protected_score_BGS, torch.cat(position, dim=1), count_BG, even_BG, self.safeguard)
        for head, table in enumerate(tables):
            evict_lowest(table, protected_score[head], (count_BG - share_BG)[:, [head]])
        layer.evicted_until = layer.seen


def shares(
    protected_score_BGS: Tensor, position_BGS: Tensor, count_BG: Tensor, even_BG: Tensor, safeguard: float
) -> Tensor:
    """``[B, G]``: the number of KV slots that each head keeps; their sum is the budget of all heads together.

    Args:
        protected_score_BGS: score of each slot; ``-inf`` for empty slots.
        position_BGS: position of each slot in the sequence.
        count_BG: number of slots with a token.
        even_BG: uniform budget of each head.
        safeguard: minimum share of the uniform budget that each head keeps.
    """
    B, G, S = protected_score_BGS.shape
    slot_BGf, kept_BGf = highest(protected_score_BGS, position_BGS, (even_BG * safeguard).long().minimum(count_BG))
    floor_BGS = torch.zeros_like(protected_score_BGS).scatter(2, slot_BGf, kept_BGf.to(protected_score_BGS.dtype)) > 0
    score_B1N = protected_score_BGS.masked_fill(floor_BGS, torch.inf).reshape(B, 1, G * S)
    total_B1 = even_BG.sum(-1, keepdim=True).minimum(count_BG.sum(-1, keepdim=True))
    slot_B1k, kept_B1k = highest(score_B1N, position_BGS.reshape(B, 1, G * S), total_B1)
    head_Bk = slot_B1k[:, 0].div(S, rounding_mode="floor")
    return torch.zeros_like(count_BG).scatter_add(1, head_Bk, kept_B1k[:, 0].to(count_BG.dtype))

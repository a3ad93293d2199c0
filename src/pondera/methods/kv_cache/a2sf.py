"""A2SF: accumulated attention with exponential forgetting."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy


class A2SF(EvictionPolicy):
    """H2O with exponential forgetting: each new query multiplies the accumulated attention by the factor `alpha`.

    More queries have seen the early tokens, so a plain sum favors them; the factor reduces this bias.

    Source: Jo and Shin, A2SF: accumulative attention scoring with forgetting factor, arXiv 2407.20485.
    Cost: as `H2O`: a second product of queries and keys in prefill, one float per KV slot.
    When not to use it: if later queries need tokens that received attention only once, long ago.
    Resolved: ``alpha=1`` is `H2O`; ``alpha=0`` uses only the attention weights of the latest query. The method sums
    weights over the query heads of a KV head, and treats sinks and recent tokens as `H2O` does.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        alpha: factor per later query, from 0 to 1. The paper tunes it by hand.
        recent: number of latest tokens that are never evicted, or their share of the budget.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> A2SF(budget=256, alpha=0.1).alpha
        0.1
    """

    paper: ClassVar[str] = "A2SF, arXiv 2407.20485"
    cost: ClassVar[str] = "budget KV slots and one float each; a second product of queries and keys in prefill"
    examples: ClassVar[dict[str, str]] = {"exact": "A2SF(64)", "tight": "A2SF(8, alpha=0.5)"}
    observation_window: int = ALL

    def __init__(
        self,
        budget: int | float | str | list = 0.2,
        alpha: float = 0.5,
        recent: int | float = 0.5,
        sinks: int = 0,
    ) -> None:
        super().__init__(budget, sinks, recent)
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha={alpha}: give the decay factor of attention per query, from 0 to 1")
        self.alpha = alpha

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: the recursion of the paper, applied to a block of queries at a time. Only real queries age."""
        real_BT = seen.real_BT.to(seen.weight_BGRTS.dtype)
        age_BT = real_BT.sum(-1, keepdim=True) - real_BT.cumsum(-1)
        factor_BT, decay_B = self.alpha**age_BT, self.alpha ** real_BT.sum(-1)
        new_BGS = (seen.weight_BGRTS * factor_BT[:, None, None, :, None]).sum((2, 3))
        table.note["received"].mul_(decay_B[:, None, None]).add_(new_BGS)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note["received"]

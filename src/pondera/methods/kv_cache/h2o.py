"""H2O: heavy hitters, the tokens with the highest accumulated attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy


class H2O(EvictionPolicy):
    """Keeps the latest tokens and the tokens with the highest attention, accumulated over all queries so far.

    Source: Zhang et al., H2O, arXiv 2306.14048.
    Cost: a second product of queries and keys in prefill, as fused kernels return no attention weights; one float per
    KV slot.
    When not to use it: for long outputs, where early attention need not predict the tokens that matter late.
    Resolved: the paper has no grouped-query attention; the method sums weights over the query heads of a KV head. Sums
    never decay, which favors early tokens: more queries have seen them. Tokens keep their positions in the sequence.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        recent: number of latest tokens that are never evicted, or their share of the budget.
        sinks: number of first tokens that are never evicted; the paper has none.
    """

    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    cost: ClassVar[str] = "budget KV slots and one float each; a second product of queries and keys in prefill"
    examples: ClassVar[dict[str, str]] = {
        "exact": "H2O(64)",
        "tight": "H2O(8)",
        "exact-share": "H2O(1.0)",
        "tight-share": "H2O(0.5, recent=3, sinks=1)",
        "exact-heads": "H2O([[64, 70], [64, 70], [64, 70]])",
        "tight-heads": "H2O([[4, 8], [8, 8], [5, 6]])",
    }
    observation_window: int = ALL

    def __init__(self, budget: int | float | str | list = 0.2, recent: int | float = 0.5, sinks: int = 0) -> None:
        super().__init__(budget, sinks, recent)

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        table.note["received"].add_(seen.received_BGS)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note["received"]

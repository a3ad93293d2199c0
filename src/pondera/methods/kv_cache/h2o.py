"""H2O: the tokens that were looked at most."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy


class H2O(EvictionPolicy):
    """Keeps the latest tokens and those that all queries so far have paid most attention to.

    Source: Zhang et al., H2O: heavy-hitter oracle, arXiv 2306.14048.
    Cost: a second product of queries and keys in the prompt, as fused kernels tell no weights; one float per slot.
    When not to use it: long outputs, where what was looked at early need not be what is needed late.
    Resolved: the paper knows no grouped heads; weights are summed over the query heads of a KV head. Sums are never decayed,
    so early tokens, which more queries have seen, are favoured. Positions stay those of the text.

    Args:
        budget: slots per layer and KV head; see `EvictionPolicy`.
        recent: the latest tokens, as a share of the budget or a number.
        sinks: first tokens that are never forgotten; the paper has none.
    """

    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    cost: ClassVar[str] = "budget rows and one float each; a second product of queries and keys in the prompt"
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
        """See `Slots.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Slots.observe`."""
        table.note("received").add_(seen.weight_BGRTS.sum((2, 3)))

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note("received")

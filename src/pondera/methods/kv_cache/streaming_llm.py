"""StreamingLLM: attention sinks and a window of the latest tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class StreamingLLM(EvictionPolicy):
    """Attention sinks and a window of the latest tokens; the policy evicts all others.

    Source: Xiao et al., arXiv 2309.17453, but with the positions of the sequence (the paper uses positions in the
    cache).
    Cost: no attention weights; a step costs attention over the budget.
    When not to use it: if later tokens need information from the middle of the sequence.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        sinks: number of first tokens that are never evicted.

    Example:
        >>> StreamingLLM(budget=1024).sinks
        4
    """

    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "budget KV slots per layer and head; no attention weights"
    examples: ClassVar[dict[str, str]] = {"exact": "StreamingLLM(64)", "tight": "StreamingLLM(8, sinks=2)"}

    def __init__(self, budget: int | float | str | list = 1024, sinks: int = 4) -> None:
        super().__init__(budget, sinks, recent=1)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`: the position, so newer tokens score higher."""
        return table.position.float()

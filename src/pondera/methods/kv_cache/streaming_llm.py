"""StreamingLLM: the first tokens and the latest."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class StreamingLLM(EvictionPolicy):
    """Keeps the first tokens, which attention leans on whatever they say, and the latest; forgets what is between.

    Source: Xiao et al., arXiv 2309.17453, with positions as they were in the text (theirs count places in the cache).
    Cost: no attention weights are looked at; a step costs what attention over the budget costs.
    When not to use it: where something in the middle of the text will be asked for.

    Args:
        budget: slots per layer and KV head; see `EvictionPolicy`.
        sinks: first tokens that are never forgotten.

    Example:
        >>> StreamingLLM(budget=1024).sinks
        4
    """

    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "budget rows per layer and head; no scores"
    examples: ClassVar[dict[str, str]] = {"exact": "StreamingLLM(64)", "tight": "StreamingLLM(8, sinks=2)"}

    def __init__(self, budget: int | float | str | list = 1024, sinks: int = 4) -> None:
        super().__init__(budget, sinks, recent=1)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`: the newer, the more."""
        return table.position.float()

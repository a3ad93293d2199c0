"""RandomEviction: the control for all policies that score tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.stateless_random import stateless_uniform
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class RandomEviction(EvictionPolicy):
    """Random eviction within a budget, the control for all policies that score tokens.

    It keeps the first tokens, the latest and a pseudo-random selection of the others.

    Source: none, a control.
    Cost: no attention weights.
    When not to use it: in applications; it is a baseline.
    Resolved: scores are a function of (seed, layer, position in the sequence) and equal for all heads of a layer.
    Results therefore do not depend on padding, batch or chunked prefill, and an evicted token never has to return.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        recent: number of latest tokens that are never evicted, or their share of the budget.
        sinks: number of first tokens that are never evicted.
        seed: seed of the scores.

    Example:
        >>> RandomEviction(budget=256).sinks
        0
    """

    paper: ClassVar[str] = "no paper; a control"
    cost: ClassVar[str] = "budget KV slots per layer and head; no attention weights"
    examples: ClassVar[dict[str, str]] = {"exact": "RandomEviction(64)", "tight": "RandomEviction(8, sinks=1)"}

    def __init__(
        self, budget: int | float | str | list = 0.2, recent: int | float = 0.5, sinks: int = 0, seed: int = 0
    ) -> None:
        super().__init__(budget, sinks, recent)
        self.seed = seed

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return stateless_uniform(layer.number(table), layer.index, self.seed)

"""RandomEviction: the control of every policy that says which tokens matter."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.stateless_random import stateless_uniform
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class RandomEviction(EvictionPolicy):
    """Keeps the first tokens, the latest, and of the others some by chance; a rule is worth what it gains over this.

    Source: none, a control.
    Cost: no attention weights are looked at.
    When not to use it: to remember.
    Resolved: chance follows from (seed, layer, place in the text), the same for all heads of a layer, so padding, batch and
    pieces of a prompt change nothing; a token that is kept now was kept before.

    Args:
        budget: slots per layer and KV head; see `Budgeted`.
        recent: the latest tokens, as a share of the budget or a number.
        sinks: first tokens that are never forgotten.
        seed: of chance.

    Example:
        >>> RandomEviction(budget=256).sinks
        0
    """

    paper: ClassVar[str] = "none: a control"
    cost: ClassVar[str] = "budget rows per layer and head; no scores"
    examples: ClassVar[dict[str, str]] = {"exact": "RandomEviction(64)", "tight": "RandomEviction(8, sinks=1)"}

    def __init__(
        self, budget: int | float | str | list = 0.2, recent: int | float = 0.5, sinks: int = 0, seed: int = 0
    ) -> None:
        super().__init__(budget, sinks, recent)
        self.seed = seed

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return stateless_uniform(layer.number(table), layer.index, self.seed)

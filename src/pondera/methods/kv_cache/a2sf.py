"""A2SF: attention received, of which older looks count less."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy


class A2SF(EvictionPolicy):
    """H2O with a forgetting factor: with every query, the attention received before counts `alpha` times as much.

    Early tokens have been seen by more queries, so a plain sum favours them; forgetting evens that out.

    Source: Jo and Shin, A2SF: accumulative attention scoring with forgetting factor, arXiv 2407.20485.
    Cost: as `H2O`: a second product of queries and keys in the prompt, one float per slot.
    When not to use it: where what was looked at once, long ago, will be asked for again.
    Resolved: ``alpha=1`` is `H2O` and ``alpha=0`` the latest row of weights alone. Weights are summed over the query heads of
    a KV head, and sinks and recent tokens are as there.

    Args:
        budget: slots per layer and KV head; see `EvictionPolicy`.
        alpha: what a look counts one query later, from 0 to 1. The paper tunes it by hand.
        recent: the latest tokens, as a share of the budget or a number.
        sinks: first tokens that are never forgotten; the paper has none.

    Example:
        >>> A2SF(budget=256, alpha=0.1).alpha
        0.1
    """

    paper: ClassVar[str] = "A2SF, arXiv 2407.20485"
    cost: ClassVar[str] = "budget rows and one float each; a second product of queries and keys in the prompt"
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
            raise UserError(f"alpha={alpha}: give what a look counts one query later, from 0 to 1")
        self.alpha = alpha

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Slots.note_defaults`: attention received so far."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Slots.observe`: the recursion of the paper, a block of queries at a time."""
        queries = len(seen.number_T)
        age_T = torch.arange(queries - 1, -1, -1, device=seen.number_T.device, dtype=seen.weight_BGRTS.dtype)
        new_BGS = (seen.weight_BGRTS * self.alpha ** age_T[:, None]).sum((2, 3))
        table.note("received").mul_(self.alpha**queries).add_(new_BGS)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note("received")

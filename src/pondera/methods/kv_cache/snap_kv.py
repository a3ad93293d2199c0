"""SnapKV: what the last queries of the prompt looked at."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import EvictionPolicy
from pondera.methods.kv_cache.common.pooling import check_pool, pooled


class SnapKV(EvictionPolicy):
    """At the end of the prompt keeps what its last queries looked at, and their neighbours; then forgets nothing more.

    The last `window` queries of the prompt are an observation window: the weights that they give are added up, pooled over
    neighbours in the text, so that words are kept whole, and the tokens with the largest are kept beside the window itself.

    Source: Li et al., SnapKV, arXiv 2404.14469.
    Cost: one product of `window` queries and the keys at the end of the prompt; one float per slot. Decoding costs no scores,
    but every generated token is kept: the budget is the prompt's.
    When not to use it: long outputs after short prompts; prompts whose end does not tell what will be asked.
    Resolved: the paper knows no grouped heads; weights are summed over the query heads of a KV head, and pooled then. What is
    in the window lends nothing to its neighbours, as in the authors' code. A prompt that comes in pieces is observed and
    cut at the end of each, so the kept set depends on the pieces; a later prompt of the same conversation is one more piece.

    Args:
        budget: slots of the prompt per layer and KV head; see `EvictionPolicy`.
        window: queries that are observed, and tokens that are kept in any case.
        kernel: neighbours that are pooled, an odd number.
        pool: ``"max"`` or ``"mean"``.
        sinks: first tokens that are never forgotten; the paper has none.

    Example:
        >>> SnapKV(budget=512, window=16).observation_window
        16
    """

    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    cost: ClassVar[str] = (
        "budget rows of the prompt and all that is generated; a few rows of scores at the end of the prompt"
    )
    examples: ClassVar[dict[str, str]] = {"exact": "SnapKV(64, window=4)", "tight": "SnapKV(8, window=3, kernel=3)"}
    prefill_only: bool = True

    def __init__(
        self,
        budget: int | float | str | list = 1024,
        window: int = 32,
        kernel: int = 7,
        pool: str = "max",
        sinks: int = 0,
    ) -> None:
        super().__init__(budget, sinks, recent=window)
        check_pool(kernel, pool)
        if window < 1:
            raise UserError(f"window={window}: give a number of queries, 1 or more")
        self.kernel, self.pool, self.observation_window = kernel, pool, window

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Slots.note_defaults`: attention received from the window."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Slots.observe`."""
        received = table.note("received")
        if seen.begins:
            received.zero_()
        received.add_(seen.weight_BGRTS.sum((2, 3)))

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        in_window_BGS = table.position >= layer.seen - self.observation_window
        return pooled(table.note("received").masked_fill(in_window_BGS, 0), table.position, self.kernel, self.pool)

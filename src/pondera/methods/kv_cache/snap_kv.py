"""SnapKV: prompt compression by the attention of an observation window."""

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
    """Prompt compression at the end of prefill, by the attention of an observation window; later steps evict nothing.

    The last `window` queries of the prompt are the observation window. The method sums their attention weights per
    token and pools the sums over neighboring tokens, so that words stay complete. It keeps the highest-scoring tokens
    and the window.

    Source: Li et al., SnapKV, arXiv 2404.14469.
    Cost: one product of `window` queries and the keys at the end of prefill; one float per KV slot. Decoding computes
    no scores, but keeps every generated token: the budget applies to the prompt.
    When not to use it: for long outputs after short prompts; for prompts whose end does not indicate the question.
    Resolved: the paper has no grouped-query attention; the method sums weights over the query heads of a KV head, then
    pools. As in the authors' code, tokens of the window add nothing to their neighbors. In chunked prefill the method
    observes and evicts at the end of each chunk, so the kept tokens depend on the chunks; a later prompt of the same
    conversation counts as one more chunk.

    Args:
        budget: KV slots of the prompt per layer and KV head: a number (512), a share of the prompt (0.25) or bytes of a
            sequence ("64MiB"); a list has one per layer, a list of lists one per head.
        window: number of observed queries; their tokens are never evicted.
        kernel: pooling width in tokens, an odd number.
        pool: ``"max"`` or ``"mean"``.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> SnapKV(budget=512, window=16).observation_window
        16
    """

    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    cost: ClassVar[str] = (
        "budget KV slots of the prompt and all generated tokens; scores of a few queries at the end of prefill"
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
        """See `Policy.note_defaults`: attention received from the observation window."""
        return {"received": 0.0}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        received = table.note["received"]
        if seen.begins:
            received.zero_()
        received.add_(seen.weight_BGRTS.sum((2, 3)))

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        in_window_BGS = table.position >= layer.seen - self.observation_window
        return pooled(table.note["received"].masked_fill(in_window_BGS, 0), table.position, self.kernel, self.pool)

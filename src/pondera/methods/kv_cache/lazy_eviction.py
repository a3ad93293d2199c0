"""LazyEviction: tokens that are attended to again and again are kept, also between two such times.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import DRAFTS, KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class LazyEviction(EvictionPolicy):
    """Keeps tokens by the longest interval after which they were attended to again, and evicts once in `window` tokens.

    In long reasoning, tokens lose attention and regain it later. A step attends to a token if its weight is at least
    `threshold`. With a, the number of steps since a token was attended to, and m, the longest such interval so far, its score
    is 2 s(-1 - a / m) + 2 s(1 - m), with the logistic function s: high as long as a is not long compared with m, and
    higher for tokens that recur often. Tokens that were never attended to score 0.

    Source: Zhang et al., LazyEviction, arXiv 2506.15969; the formula is that of the authors' code, which is available only as
    a copy in another public repository (WeianMao/triattention).
    Cost: two floats per KV slot; the weights of each query in decoding, and of the last `window` queries of the prompt.
    When not to use it: for short outputs, which show no recurrence; for prompts much longer than the budget (`SnapKV`).
    Resolved, and our reading: the authors keep the prompt until the first eviction in decoding; here a prompt beyond the
    budget is cut at its end, after its last `window` queries have been observed as if they were decoded. The authors let
    the cache grow by `window` slots above its capacity; here the budget includes them, so an eviction leaves
    ``budget - window + 1`` slots. Their code repeats keys and values for every query head; here a KV head attends if any of
    its query heads does. Among equal scores the newer token wins. Within `AdaKV`, every token evicts.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head; at least ``sinks + 2 * window - 1``.
        window: tokens between two evictions; this number of latest tokens is never evicted.
        threshold: attention weight from which on a token counts as attended to.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> LazyEviction(1024, window=128).budget.least
        255
    """

    paper: ClassVar[str] = "LazyEviction, arXiv 2506.15969"
    cost: ClassVar[str] = "budget KV slots and two floats each; the weights of every query in decoding"
    examples: ClassVar[dict[str, str]] = {
        "exact": "LazyEviction(64, window=4)",
        "tight": "LazyEviction(8, window=3, threshold=0.08, sinks=1)",
        "exact-heads": "LazyEviction([[64, 70], [64, 70], [64, 70]], window=3)",
        "tight-heads": "LazyEviction([[5, 8], [8, 8], [5, 6]], window=3, threshold=0.08)",
    }

    def __init__(
        self,
        budget: int | float | str | list = 0.5,
        window: int = 128,
        threshold: float = 1e-4,
        sinks: int = 0,
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise UserError(f"window={window!r}: give the number of tokens between two evictions, 1 or more")
        if not 0 < threshold <= 1:
            raise UserError(
                f"threshold={threshold}: give an attention weight above 0 and at most 1; the authors use 1e-4"
            )
        always = 2 * window - 1 + (sinks if isinstance(sinks, int) else 0)  # the base class refuses other sinks
        super().__init__(budget, sinks, recent=window, least=always)
        self.window, self.threshold, self.observation_window = window, threshold, window

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: steps since a step attended to it, and the longest interval between such steps."""
        return {"age": 0.0, "interval": 0.0}

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`: every draft token, as each may stay."""
        return max(DRAFTS, self.window) if layer.record_past else self.window

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        weight_BGTS = seen.weight_BGRTS.amax(2)
        step_BT = seen.real_BT & (seen.number_T >= layer.prompt - self.window)
        there_BGTS = step_BT[:, None, :, None] & (table.position[:, :, None] <= seen.number_T[:, None])
        attended_BGTS = there_BGTS & (weight_BGTS >= self.threshold)
        # Steps are counted from the last one that attended to the token, which is step 0.
        step_BGTS = table.note["age"][:, :, None] + there_BGTS.cumsum(2)
        last_BGTS = step_BGTS.masked_fill(~attended_BGTS, 0).cummax(2).values
        before_BGTS = torch.cat([torch.zeros_like(last_BGTS[:, :, :1]), last_BGTS[:, :, :-1]], 2)
        interval_BGTS = (step_BGTS - before_BGTS).masked_fill(~attended_BGTS, 0)
        table.note["interval"].copy_(torch.maximum(table.note["interval"], interval_BGTS.amax(2)))
        table.note["age"].copy_(step_BGTS[:, :, -1] - last_BGTS[:, :, -1])

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        age_BGS, interval_BGS = table.note["age"], table.note["interval"]
        recurs_BGS = 2 * torch.sigmoid(-1 - age_BGS / interval_BGS) + 2 * torch.sigmoid(1 - interval_BGS)
        return torch.where(interval_BGS > 0, recurs_BGS, 0)

    def evict_over_budget(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor, over_BG: Tensor) -> None:
        """See `BudgetedPolicy.evict_over_budget`: makes room for the next `window` tokens."""
        lagged_BG = torch.where(over_BG > 0, over_BG + self.window - 1, over_BG)
        super().evict_over_budget(layer, table, limit_BG, lagged_BG)

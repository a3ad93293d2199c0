"""TOVA: keeps the tokens that the latest query attends to.

Shapes: B batch, S slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import DRAFTS, KVStoreLayer
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class TOVA(EvictionPolicy):
    """Keeps the tokens with the highest attention from the latest query, which all heads of a layer choose together.

    After each call the score of a token is its attention weight from the last query, averaged over all heads of the layer.
    So each decode step evicts the token that it attended to least, and no score outlives its step.

    Source: Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104.
    Cost: one float per KV slot; the scores of one query, which a decode step computes anyway.
    When not to use it: if what one step ignores matters later (`H2O` accumulates). For prompts whose last token does not
    indicate the question.
    Resolved: the prompt is scored once, by its last query, and not token by token. While tokens may be rolled back, all
    queries of a call are observed, and the last that stays decides. With one budget per head, and within `AdaKV`, each KV
    head averages over its own query heads.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head.
        recent: number of latest tokens that are never evicted, or their share of the budget; the paper protects none, but
            the latest token usually attends to itself.
        sinks: number of first tokens that are never evicted; the paper has none.

    Example:
        >>> TOVA(512).recent
        1
    """

    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"
    cost: ClassVar[str] = "budget KV slots and one float each; the scores of the last query"
    examples: ClassVar[dict[str, str]] = {
        "exact": "TOVA(64)",
        "tight": "TOVA(8)",
        "exact-heads": "TOVA([[64, 70], [64, 70], [64, 70]])",
        "tight-heads": "TOVA([[4, 8], [8, 8], [5, 6]])",
    }
    observation_window: int = 1

    def __init__(self, budget: int | float | str | list = 0.5, recent: int | float = 1, sinks: int = 0) -> None:
        super().__init__(budget, sinks, recent)

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: attention from the latest query."""
        return {"weight": 0.0}

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`: any of the draft tokens may become the latest."""
        return DRAFTS if layer.record_past else 1

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        weight_BS = seen.weight_BGRTS[:, :, :, -1].mean((1, 2))
        weight_BGS = torch.where(seen.real_BT[:, -1, None, None], weight_BS[:, None], table.note["weight"])
        table.note["weight"].copy_(weight_BGS)

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        return table.note["weight"]

"""DapQ: scores prompt tokens with queries rotated to decoding positions.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, D head width.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation, scores
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.policy import ALL, Policy
from pondera.methods.kv_cache.common.query_rotation import QueryRotation
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.snap_kv import SnapKV


class DapQ(PolicyWrapper):
    """SnapKV with the queries of the observation window rotated to decoding positions, those after the prompt.

    The attention of a query depends more on its position than on its content. Queries at the positions of the answer
    therefore predict the attention of the answer better.

    Source: DapQ, arXiv 2603.11564.
    Cost: as the policy's; the method computes the products of the observation window twice.
    When not to use it: on models without rotary positions, or if the policy alone suffices.
    Resolved: the paper appends pseudo tokens and runs them through the model. This variant instead rotates the queries
    of the window to the positions after the prompt, which needs no further pass. A rotated query attends to the whole
    prompt. The method keeps the tokens of the window, as `SnapKV` does.

    Args:
        policy: `SnapKV`, or another policy with an observation window at the end of the prompt; default: ``SnapKV()``.
        ahead: number of positions by which queries move; default: `None`, the length of the window, so that they are at
            the first positions of the answer; 0: the policy alone.

    Example:
        >>> DapQ(SnapKV(512, window=32)).ahead
        32
    """

    paper: ClassVar[str] = "DapQ, arXiv 2603.11564"
    cost: ClassVar[str] = "the policy's; attention scores of a few more queries at the end of the prompt"
    examples: ClassVar[dict[str, str]] = {
        "exact": "DapQ(SnapKV(64, window=4))",
        "tight": "DapQ(SnapKV(8, window=3, kernel=3))",
    }

    def __init__(self, policy: KVCacheMethod | None = None, ahead: int | None = None) -> None:
        policy = SnapKV() if policy is None else policy
        if not isinstance(policy, Policy) or not policy.prefill_only or not 0 < policy.observation_window < ALL:
            raise UserError(
                f"DapQ({type(policy).__name__}(...)): give a policy with an observation window at the end of the "
                "prompt, e.g. DapQ(SnapKV(512))"
            )
        super().__init__(policy)
        self.ahead = policy.observation_window if ahead is None else ahead
        if self.ahead < 0:
            raise UserError(f"ahead={ahead}: give a number of positions, 0 or more")
        self.rotation: QueryRotation | None = None

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        if self.ahead:
            self.rotation = QueryRotation.of(model, type(self).__name__, self.rotation)
        super().prepare(model, cache)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        raise UserError(
            f"{type(self).__name__} moves queries ahead by tokens and scores all slots with them, and a think method keeps "
            "several slots per token, which not every query attends to; use SnapKV(1024)"
        )

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        if self.rotation is not None:
            query_BGRTD = self.rotation.move(seen.query_BGRTD, self.ahead).to(seen.query_BGRTD.dtype)
            score_BGRTS = scores(query_BGRTD, table.keys, table.real[:, :, None], seen.scaling, seen.softmax)
            seen = dataclasses.replace(seen, query_BGRTD=query_BGRTD, score_BGRTS=score_BGRTS)
        self.policy.observe(layer, table, seen)

"""A policy around another policy: by default it delegates every call."""

from __future__ import annotations

from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.policy import Policy


class PolicyWrapper(Policy):
    """Delegates every call to another policy; subclasses override the calls that they change.

    Args:
        policy: the wrapped policy.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.observation_window, self.sparse_attention, self.exact = (
            policy.observation_window,
            policy.sparse_attention,
            policy.exact,
        )
        self.prefill_only, self.observes_scores = policy.prefill_only, policy.observes_scores

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`."""
        return self.policy.note_defaults

    @property
    def by_head(self) -> bool:
        """See `Policy.by_head`."""
        return self.policy.by_head

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        self.policy.check(config, layers)

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`: the layer of the wrapped policy, which calls the wrapper."""
        layer = self.policy.layer(config, index, among)
        layer.method = self
        return layer

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        super().check_passes()
        self.policy.check_passes()

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        self.policy.prepare(model, cache)

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """See `Policy.select_kv`."""
        return self.policy.select_kv(layer, table, query_BGRTD, call)

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        return self.policy.observed_queries(layer, call)

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`."""
        self.policy.observe(layer, table, seen)

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """See `Policy.evict_layer`."""
        self.policy.evict_layer(layer)

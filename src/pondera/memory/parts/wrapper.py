"""A memory around another: what it does not do itself, the other does."""

from __future__ import annotations

from torch import Tensor

from pondera.memory.contract import MemoryCache
from pondera.memory.parts.attention import Seen
from pondera.memory.parts.layer import Call
from pondera.memory.parts.slot_layer import SlotLayer
from pondera.memory.parts.slot_table import SlotTable
from pondera.memory.parts.slots import Slots
from pondera.model.hf import PreTrainedConfig, PreTrainedModel


class Wrapper(Slots):
    """Hands every question on to another memory of slots.

    Args:
        policy: the other.
    """

    def __init__(self, policy: Slots) -> None:
        super().__init__()
        self.policy = policy
        self.watches, self.selects, self.exact = policy.watches, policy.selects, policy.exact
        self.prompt_only = policy.prompt_only

    @property
    def fresh(self) -> dict[str, float]:
        """See `Slots.fresh`."""
        return self.policy.fresh

    @property
    def by_head(self) -> bool:
        """See `Slots.by_head`."""
        return self.policy.by_head

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `Memory.check`."""
        self.policy.check(config, layers)

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> SlotLayer:
        """See `Memory.layer`: the policy's, which asks the wrapper."""
        layer = self.policy.layer(config, index, among)
        layer.memory = self
        return layer

    def prepare(self, model: PreTrainedModel, cache: MemoryCache) -> None:
        """See `Memory.prepare`."""
        self.policy.prepare(model, cache)

    def select(self, layer: SlotLayer, table: SlotTable, query_BGRTD: Tensor, call: Call) -> Tensor | None:
        """See `Slots.select`."""
        return self.policy.select(layer, table, query_BGRTD, call)

    def watched(self, layer: SlotLayer, call: Call) -> int:
        """See `Slots.watched`."""
        return self.policy.watched(layer, call)

    def observe(self, layer: SlotLayer, table: SlotTable, seen: Seen) -> None:
        """See `Slots.observe`."""
        self.policy.observe(layer, table, seen)

    def settle(self, layer: SlotLayer) -> bool:
        """See `Slots.settle`."""
        return self.policy.settle(layer)

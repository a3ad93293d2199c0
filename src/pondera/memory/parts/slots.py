"""Memories whose past is a table of slots: which slots a query attends to, and which are forgotten.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pondera.ground.errors import UserError
from pondera.memory.contract import Memory, kv_heads
from pondera.memory.parts.attention import Seen
from pondera.memory.parts.budget import Budget
from pondera.memory.parts.layer import Call, MemoryLayer
from pondera.memory.parts.slot_layer import SlotLayer
from pondera.memory.parts.slot_table import SlotTable
from pondera.model.hf import PreTrainedConfig

ALL = 2**62
"""Every query of a call."""
FEW = 8
"""Up to so many slots are forgotten one by one, leaving holes for the next tokens; more are forgotten by moving the rest."""


class Slots(Memory):
    """A memory whose layers keep slots. Called in each layer and forward in this order: `select`, `observe`, `forget`."""

    watches: int = 0
    """How many of the last queries of a call it wants to see; `ALL` of them; 0: none, which is fastest."""
    selects: bool = False
    """Attends to a choice of slots."""
    exact: bool = True
    """While all tokens are there, attention is by the stock kernel, so that nothing differs in the last bit."""

    @property
    def fresh(self) -> dict[str, float]:
        """What it notes about each slot, by name, and what a new slot starts with."""
        return {}

    @property
    def by_head(self) -> bool:
        """KV heads of a layer keep different numbers of slots."""
        return False

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> MemoryLayer:
        """See `Memory.layer`."""
        return SlotLayer(self, index, among)

    def select(self, layer: SlotLayer, table: SlotTable, query_BGRTD: Tensor, call: Call) -> Tensor | None:
        """``[B, G, k]``: the slots that these queries attend to; none: all. The new tokens are in the table already."""
        return None

    def observe(self, layer: SlotLayer, table: SlotTable, seen: Seen) -> None:  # noqa: B027 (optional)
        """Is shown what queries looked at, and may change the table's notes and the layer's state, but not its slots."""

    @abstractmethod
    def forget(self, layer: SlotLayer, table: SlotTable, heads: list[int]) -> bool:
        """Empties slots; tells whether anything was forgotten that could be missed when tokens are taken back."""


class Eviction(Slots):
    """Keeps the first tokens, the latest, and of the others those with the highest priority, within a budget.

    Most papers need one function more: `priority`, and `observe` where it comes from attention. Of slots with the same
    priority the older is forgotten.

    Args:
        budget: slots per layer and KV head: tokens (512), a share of the tokens seen (0.25), or bytes of a sequence
            ("64MiB"); a list for one per layer, of lists for one per head. Shares are rounded down, then to what is protected.
        sinks: first tokens that are never forgotten.
        recent: latest tokens that are never forgotten; a share of the budget if below 1.
    """

    every: ClassVar[int] = 1
    """Slots by which the budget may be overrun before anything is forgotten."""

    def __init__(self, budget: Budget | int | float | str | list, sinks: int, recent: int | float) -> None:
        super().__init__()
        if isinstance(recent, bool) or recent < 0 or (isinstance(recent, float) and recent > 1):
            raise UserError(f"recent={recent!r}: give a number of tokens, or a share of the budget from 0.0 to 1.0")
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise UserError(f"sinks={sinks!r}: give a number of tokens, 0 or more")
        self.sinks, self.recent = sinks, recent
        least = sinks + (recent if isinstance(recent, int) else 0)
        self.budget = Budget(budget, max(1, least))

    @property
    def by_head(self) -> bool:
        """See `Slots.by_head`."""
        return self.budget.by_head

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `Memory.check`."""
        self.budget.check(len(layers), kv_heads(config))

    @abstractmethod
    def priority(self, layer: SlotLayer, table: SlotTable) -> Tensor:
        """``[B, G, S]``: how much each slot is worth keeping."""

    def slots(self, layer: SlotLayer, table: SlotTable, heads: list[int]) -> Tensor:
        """``[B, g]``: the slots that these heads may have now."""
        row_bytes = table.keys_BGSD.element_size() * (table.keys_BGSD.shape[-1] + table.values_BGSD.shape[-1])
        found = [
            self.budget.slots(layer.index, heads, tokens, row_bytes, layer.among) for tokens in layer.real_tokens()
        ]
        return torch.tensor(found, device=table.keys_BGSD.device)

    def forget(self, layer: SlotLayer, table: SlotTable, heads: list[int]) -> bool:
        """See `Slots.forget`."""
        real_BGS, limit_BG = table.real, self.slots(layer, table, heads)
        count_BG = real_BGS.sum(-1)
        fewest, most = (int(number) for number in torch.aminmax(count_BG - limit_BG))
        if most < self.every:
            return False
        priority_BGS = self.priority(layer, table).masked_fill(self._protected(layer, table, limit_BG), torch.inf)
        priority_BGS = priority_BGS.masked_fill(~real_BGS, -torch.inf)
        if fewest == most <= FEW and not table.whole:
            for _ in range(most):
                slot_BG1 = _lowest(priority_BGS.masked_fill(~table.real, torch.inf), table.position)
                table.forget(slot_BG1)
        else:
            table.keep(*_highest(priority_BGS, table.position, torch.minimum(count_BG, limit_BG)))
        return True

    def _protected(self, layer: SlotLayer, table: SlotTable, limit_BG: Tensor) -> Tensor:
        """``[B, G, S]``: sinks and recent tokens."""
        position_BGS = table.position
        recent_BG = limit_BG.mul(self.recent).long() if isinstance(self.recent, float) else self.recent
        newest = torch.as_tensor(layer.seen - recent_BG, device=position_BGS.device)
        recent_BGS = position_BGS >= newest[..., None] if newest.ndim else position_BGS >= newest
        if not self.sinks:
            return recent_BGS
        return recent_BGS | (position_BGS < (layer.state["padding"] + self.sinks)[:, None, None])


def _lowest(priority_BGS: Tensor, position_BGS: Tensor) -> Tensor:
    """``[B, G, 1]``: the slot of the lowest priority; of several the oldest."""
    lowest_BG1 = priority_BGS.amin(-1, keepdim=True)
    newest = torch.iinfo(position_BGS.dtype).max
    return torch.where(priority_BGS == lowest_BG1, position_BGS, newest).argmin(-1, keepdim=True)


def _highest(priority_BGS: Tensor, position_BGS: Tensor, count_BG: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the highest priorities in the order of the text, and which of them are within each row's count."""
    newest_BGS = position_BGS.argsort(dim=-1, descending=True)
    order_BGS = priority_BGS.gather(2, newest_BGS).argsort(dim=-1, descending=True, stable=True)
    chosen_BGk = newest_BGS.gather(2, order_BGS)[..., : int(count_BG.max())]
    kept_BGk = torch.arange(chosen_BGk.shape[2], device=chosen_BGk.device) < count_BG[..., None]
    # In the order of the text; those that only fill up go last.
    at_BGk = position_BGS.gather(2, chosen_BGk).masked_fill(~kept_BGk, torch.iinfo(position_BGS.dtype).max)
    order_BGk = at_BGk.argsort(dim=-1)
    return chosen_BGk.gather(2, order_BGk), kept_BGk.gather(2, order_BGk)

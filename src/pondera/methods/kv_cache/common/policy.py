"""Memories whose past is a table of slots: which slots a query attends to, and which are forgotten.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pondera.arch.dimensions import kv_heads
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.budget import SlotBudget

ALL = 2**62
"""Every query of a call."""
FEW = 8
"""Up to so many slots are forgotten one by one, leaving holes for the next tokens; more are forgotten by moving the rest."""


class Policy(KVCacheMethod):
    """A memory whose layers keep slots. Called in each layer and forward in this order: `select_kv`, `observe`, `evict`."""

    observation_window: int = 0
    """How many of the last queries of a call it wants to see; `ALL` of them; 0: none, which is fastest."""
    sparse_attention: bool = False
    """Attends to a choice of slots."""
    exact: bool = True
    """While all tokens are there, attention is by the stock kernel, so that nothing differs in the last bit."""
    prefill_only: bool = False
    """Watches and forgets at the end of a prompt only; what is generated comes on top."""

    @property
    def note_defaults(self) -> dict[str, float]:
        """What it notes about each slot, by name, and what a new slot starts with."""
        return {}

    @property
    def by_head(self) -> bool:
        """KV heads of a layer keep different numbers of slots."""
        return False

    @property
    def needs_rows_of_config(self) -> bool:
        """See `KVCacheMethod.needs_rows_of_config`: lists of budgets are."""
        return self.by_head

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`."""
        return KVStoreLayer(self, index, among)

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """``[B, G, k]``: the slots that these queries attend to; none: all. The new tokens are in the table already.

        A row that attends to fewer than k slots has -1 for the others.
        """
        return None

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """How many of the last queries of this call it wants to see; asked after `select`."""
        return self.observation_window

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:  # noqa: B027 (optional)
        """Is shown what queries looked at, and may change the table's notes and the layer's state, but not its slots."""

    def evict(self, layer: KVStoreLayer, table: KVStore, heads: list[int]) -> bool:
        """Empties slots, none by default; tells whether any was that could be missed when tokens are taken back."""
        return False

    def evict_layer(self, layer: KVStoreLayer) -> bool:
        """Has every table of a layer forget; tells whether any did."""
        forgot = False
        for part, table in layer.parts():
            forgot |= self.evict(layer, table, layer.heads(part))
        return forgot


class BudgetedPolicy(Policy):
    """Keeps the first tokens, the latest, and as many of the others as a budget allows; `evict_over_budget` decides which.

    Args:
        budget: slots per layer and KV head: tokens (512), a share of the tokens seen (0.25), or bytes of a sequence
            ("64MiB"); a list for one per layer, of lists for one per head. Shares are rounded down, then to what is
            protected.
        sinks: first tokens that are never forgotten.
        recent: latest tokens that are never forgotten; a share of the budget if below 1.
        least: the smallest budget that makes sense.
    """

    slack: ClassVar[int] = 1
    """Slots by which the budget may be overrun before anything is forgotten."""
    budget_from_prompt: ClassVar[bool] = False
    """Shares are of the prompt, so that the budget does not grow with what is generated."""

    def __init__(
        self, budget: SlotBudget | int | float | str | list, sinks: int, recent: int | float, least: int = 1
    ) -> None:
        super().__init__()
        if isinstance(recent, bool) or recent < 0 or (isinstance(recent, float) and recent > 1):
            raise UserError(f"recent={recent!r}: give a number of tokens, or a share of the budget from 0.0 to 1.0")
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise UserError(f"sinks={sinks!r}: give a number of tokens, 0 or more")
        self.sinks, self.recent = sinks, recent
        self.budget = SlotBudget(budget, max(least, sinks + (recent if isinstance(recent, int) else 0)))

    @property
    def by_head(self) -> bool:
        """See `Policy.by_head`."""
        return self.budget.by_head

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        if self.by_head:
            self.budget.check(len(layers), kv_heads(config))
        else:
            self.budget.check(len(layers), 0)

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        return self.observation_window if not self.prefill_only or layer.at_prompt else 0

    def slots(self, layer: KVStoreLayer, table: KVStore, heads: list[int]) -> Tensor:
        """``[B, g]``: the slots that these heads may have now."""
        row_bytes = table.keys_BGSD.element_size() * (table.keys_BGSD.shape[-1] + table.values_BGSD.shape[-1])
        found = []
        for tokens in layer.real_tokens(self.budget_from_prompt):
            found.append(self.budget.slots(layer.index, heads, tokens, row_bytes, layer.among))
        return torch.tensor(found, device=table.keys_BGSD.device)

    def evict(self, layer: KVStoreLayer, table: KVStore, heads: list[int]) -> bool:
        """See `Policy.evict`."""
        if self.prefill_only and not layer.at_prompt:
            return False
        limit_BG = self.slots(layer, table, heads)
        over_BG = table.real.sum(-1) - limit_BG
        if int(over_BG.amax()) < self.slack:
            return False
        self.evict_over_budget(layer, table, heads, limit_BG, over_BG)
        return True

    @abstractmethod
    def evict_over_budget(
        self, layer: KVStoreLayer, table: KVStore, heads: list[int], limit_BG: Tensor, over_BG: Tensor
    ) -> None:
        """Forgets, until no head has more slots than its limit; `over_BG` are too many, or negative."""

    def protected(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor) -> Tensor:
        """``[B, G, S]``: sinks and recent tokens."""
        position_BGS = table.position
        recent_BG = limit_BG.mul(self.recent).long() if isinstance(self.recent, float) else self.recent
        newest = torch.as_tensor(layer.seen - recent_BG, device=position_BGS.device)
        recent_BGS = position_BGS >= newest[..., None] if newest.ndim else position_BGS >= newest
        if not self.sinks:
            return recent_BGS
        return recent_BGS | (position_BGS < (layer.state["padding"] + self.sinks)[:, None, None])


class EvictionPolicy(BudgetedPolicy):
    """Keeps the first tokens, the latest, and of the others those with the highest score, within a budget.

    Most papers need one function more: `score`, and `observe` where it comes from attention. Of slots with the same
    score the older is forgotten.
    """

    @abstractmethod
    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """``[B, G, S]``: how much each slot is protected_score keeping."""

    def evict_over_budget(
        self, layer: KVStoreLayer, table: KVStore, heads: list[int], limit_BG: Tensor, over_BG: Tensor
    ) -> None:
        """See `BudgetedPolicy.evict_over_budget`."""
        evict_lowest(table, self.protected_score(layer, table, limit_BG), over_BG)

    def protected_score(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor) -> Tensor:
        """``[B, G, S]``: `score`; ``inf`` for what is protected, ``-inf`` for what is not there."""
        score_BGS = self.score(layer, table).masked_fill(self.protected(layer, table, limit_BG), torch.inf)
        return score_BGS.masked_fill(~table.real, -torch.inf)


def evict_lowest(table: KVStore, score_BGS: Tensor, over_BG: Tensor) -> None:
    """Forgets the slots of the lowest score; of equals the older.

    Args:
        table: of slots.
        score_BGS: of each; ``-inf`` of those that hold nothing.
        over_BG: how many each head has to forget; none where it is negative.
    """
    fewest, most = torch.stack(torch.aminmax(over_BG)).tolist()
    if fewest == most <= FEW and not table.whole:
        for _ in range(most):
            table.evict(_lowest(score_BGS.masked_fill(~table.real, torch.inf), table.position))
    elif most > 0:
        table.keep(*highest(score_BGS, table.position, table.real.sum(-1) - over_BG.clamp(min=0)))


def _lowest(score_BGS: Tensor, position_BGS: Tensor) -> Tensor:
    """``[B, G, 1]``: the slot of the lowest score; of several the oldest."""
    lowest_BG1 = score_BGS.amin(-1, keepdim=True)
    newest = torch.iinfo(position_BGS.dtype).max
    return torch.where(score_BGS == lowest_BG1, position_BGS, newest).argmin(-1, keepdim=True)


def highest(score_BGS: Tensor, position_BGS: Tensor, count_BG: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the highest priorities in the order of the text, and which of them are within each row's count."""
    newest_BGS = position_BGS.argsort(dim=-1, descending=True)
    order_BGS = score_BGS.gather(2, newest_BGS).argsort(dim=-1, descending=True, stable=True)
    chosen_BGk = newest_BGS.gather(2, order_BGS)[..., : int(count_BG.max())]
    kept_BGk = torch.arange(chosen_BGk.shape[2], device=chosen_BGk.device) < count_BG[..., None]
    # In the order of the text; those that only fill up go last.
    at_BGk = position_BGS.gather(2, chosen_BGk).masked_fill(~kept_BGk, torch.iinfo(position_BGS.dtype).max)
    order_BGk = at_BGk.argsort(dim=-1)
    return chosen_BGk.gather(2, order_BGk), kept_BGk.gather(2, order_BGk)

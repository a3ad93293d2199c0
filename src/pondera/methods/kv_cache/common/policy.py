"""Policies over KV slots: to which slots a query attends, and which slots to evict.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pondera.arch.dimensions import kv_heads
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.native_evict import evict_natively
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.budget import SlotBudget

if TYPE_CHECKING:
    from pondera.methods.kv_cache.common.second_run import AfterPrompt

ALL = 2**62
"""Observes every query of a call."""
FEW = 8
"""Up to this number of slots, eviction leaves holes for new tokens; above, it moves the remaining slots together."""


class Policy(KVCacheMethod):
    """A KV cache method with a table of KV slots per layer.

    In each layer and forward, the layer calls `select_kv`, `observe` and `evict` in this order.
    """

    observation_window: int = 0
    """Number of last queries of a call whose attention it observes; `ALL`: all; 0 (fastest): no query."""
    observes_scores: bool = True
    """Whether it needs the scores of observed queries; if not, none are computed, and observations have scores of no slot."""
    sparse_attention: bool = False
    """Whether queries attend to a selection of slots."""
    exact: bool = True
    """Before the first eviction, attention uses the stock kernel, so that results are bit-identical."""
    prefill_only: bool = False
    """Observes and evicts only at the end of prefill; generated tokens stay in addition to the budget."""

    @property
    def note_defaults(self) -> dict[str, float]:
        """The names of its per-slot notes, and their values for a new slot."""
        return {}

    @property
    def second_run(self) -> AfterPrompt | None:
        """What evicts after the prompt and may run the model again; default: `None`, nothing does."""
        return None

    @property
    def by_head(self) -> bool:
        """Whether the KV heads of a layer keep different numbers of slots."""
        return False

    @property
    def needs_rows_of_config(self) -> bool:
        """See `KVCacheMethod.needs_rows_of_config`: lists of budgets do."""
        return self.by_head

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`."""
        return KVStoreLayer(self, index, among)

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """``[B, G, k]``: the slots that these queries attend to, new tokens included; `None`: all.

        A row that attends to fewer than k slots is padded with -1.
        """
        return None

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """Number of last queries of this call to observe; the layer asks once per call, after `select_kv` of all tables."""
        return self.observation_window

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:  # noqa: B027 (optional)
        """Receives the attention of the observed queries; may change notes and the layer's state, but not the slots."""

    def evict(self, layer: KVStoreLayer, table: KVStore) -> bool:
        """Evicts slots, by default none; returns True if eviction makes earlier rollback impossible."""
        return False

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """Evicts from every table of a layer, and sets `KVStoreLayer.evicted_until` if any of them evicted slots."""
        for table in layer.tables:
            if self.evict(layer, table):
                layer.evicted_until = layer.seen


class BudgetedPolicy(Policy):
    """Keeps the first tokens, the latest and a budget of others; `evict_over_budget` selects them.

    Args:
        budget: KV slots per layer and KV head: a number of tokens (512), a share of the tokens seen (0.25), or bytes of
            a sequence ("64MiB"); a list has one per layer, a list of lists one per head. The policy rounds shares down,
            but not below the number of protected tokens.
        sinks: number of first tokens that are never evicted.
        recent: number of latest tokens that are never evicted; a float is a share of the budget.
        least: the smallest useful budget.
    """

    slack: ClassVar[int] = 1
    """Eviction starts once a head exceeds the budget by this number of slots."""
    budget_from_prompt: ClassVar[bool] = False
    """Shares refer to the prompt, so that the budget does not grow with generated tokens."""

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
        """``[B, g]``: the current budget of these heads in slots."""
        return budgeted(self.budget, layer, table, heads, self.budget_from_prompt)

    def evict(self, layer: KVStoreLayer, table: KVStore) -> bool:
        """See `Policy.evict`."""
        if self.prefill_only and not layer.at_prompt:
            return False
        limit_BG = self.slots(layer, table, table.heads)
        over_BG = (table.position >= 0).sum(-1) - limit_BG
        if int(over_BG.amax()) < self.slack:
            return False
        self.evict_over_budget(layer, table, limit_BG, over_BG)
        return True

    @abstractmethod
    def evict_over_budget(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor, over_BG: Tensor) -> None:
        """Evicts until no head has more slots than its limit; `over_BG` is the excess, or negative."""

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
    """Keeps the first tokens, the latest and, within a budget, the others with the highest score.

    Most papers only need `score`, and `observe` if the score is based on attention. Among slots with equal scores the
    policy evicts the older.
    """

    signed: ClassVar[bool] = False
    """Whether scores may be negative, so that a wrapper cannot multiply them."""

    @abstractmethod
    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """``[B, G, S]``: the score of each slot; the policy evicts the lowest."""

    def evict(self, layer: KVStoreLayer, table: KVStore) -> bool:
        """See `Policy.evict`: a few slots with a native kernel."""
        if table.whole or self.prefill_only or self.slack > 1 or not _plain(type(self)):
            return super().evict(layer, table)
        limits = limits_of(self.budget, layer, table, table.heads, self.budget_from_prompt)
        if table.used <= min(map(min, limits)):
            return False
        first = [pads + self.sinks for pads in layer.state["padding"].tolist()] if self.sinks else [0] * len(limits)
        score_BGS = self.score(layer, table)
        over = evict_natively(table.position, score_BGS, limits, first, layer.seen, self.recent, FEW)
        return super().evict(layer, table) if over is None or over > FEW else over > 0

    def evict_over_budget(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor, over_BG: Tensor) -> None:
        """See `BudgetedPolicy.evict_over_budget`."""
        evict_lowest(table, self.protected_score(layer, table, limit_BG), over_BG)

    def protected_score(self, layer: KVStoreLayer, table: KVStore, limit_BG: Tensor) -> Tensor:
        """``[B, G, S]``: `score`, but ``inf`` for protected slots and ``-inf`` for empty ones."""
        score_BGS = self.score(layer, table).masked_fill(self.protected(layer, table, limit_BG), torch.inf)
        return score_BGS.masked_fill(table.position < 0, -torch.inf)


@functools.cache
def _plain(kind: type[EvictionPolicy]) -> bool:
    """Whether a class evicts by `score` alone, without an eviction, protection or budget of its own."""
    names = (("evict_over_budget", "protected_score"), ("protected", "slots"))
    return all(
        getattr(kind, name) is getattr(base, name)
        for base, each in zip((EvictionPolicy, BudgetedPolicy), names, strict=True)
        for name in each
    )


def limits_of(
    budget: SlotBudget, layer: KVStoreLayer, table: KVStore, heads: list[int], from_prompt: bool = False
) -> list[list[int]]:
    """For each batch row, a budget in slots for each of some KV heads.

    Args:
        budget: the budget.
        layer: the layer.
        table: the KV slots of these heads.
        heads: indices of KV heads.
        from_prompt: shares refer to the tokens of the prompt, not to those seen.
    """
    row_bytes = table.keys_BGSD.element_size() * (table.keys_BGSD.shape[-1] + table.values_BGSD.shape[-1])
    if budget.relative:
        tokens = layer.real_tokens(from_prompt)
        return [budget.slots(layer.index, heads, seen, row_bytes, layer.among) for seen in tokens]
    # The same for every sequence.
    return [budget.slots(layer.index, heads, 0, row_bytes, layer.among)] * len(table.keys_BGSD)


def budgeted(
    budget: SlotBudget, layer: KVStoreLayer, table: KVStore, heads: list[int], from_prompt: bool = False
) -> Tensor:
    """``[B, g]``: a budget in slots; see `limits_of`."""
    return torch.tensor(limits_of(budget, layer, table, heads, from_prompt), device=table.keys_BGSD.device)


def evict_lowest(table: KVStore, score_BGS: Tensor, over_BG: Tensor) -> None:
    """Evicts the slots with the lowest scores; among equal scores the older.

    Args:
        table: the KV slots.
        score_BGS: score of each slot; ``-inf`` for empty slots.
        over_BG: number of slots that each head must evict; a negative number evicts nothing.
    """
    fewest, most = torch.stack(torch.aminmax(over_BG)).tolist()
    position_BGS = table.position
    if fewest == most <= FEW and not table.whole:
        for _ in range(most):
            real_score_BGS = score_BGS.masked_fill(position_BGS < 0, torch.inf)
            lowest_BGS = real_score_BGS == real_score_BGS.amin(-1, keepdim=True)
            newest = torch.iinfo(position_BGS.dtype).max
            table.evict(torch.where(lowest_BGS, position_BGS, newest).argmin(-1, keepdim=True))
    elif most > 0:
        table.keep(*highest(score_BGS, position_BGS, table.real.sum(-1) - over_BG.clamp(min=0)))


def highest(score_BGS: Tensor, position_BGS: Tensor, count_BG: Tensor) -> tuple[Tensor, Tensor]:
    """The slots with the highest scores in the order of the sequence, and which of them are within each row's count."""
    newest_BGS = position_BGS.argsort(dim=-1, descending=True)
    order_BGS = score_BGS.gather(2, newest_BGS).argsort(dim=-1, descending=True, stable=True)
    chosen_BGk = newest_BGS.gather(2, order_BGS)[..., : int(count_BG.max())]
    kept_BGk = torch.arange(chosen_BGk.shape[2], device=chosen_BGk.device) < count_BG[..., None]
    # In the order of the sequence; slots beyond the count come last.
    at_BGk = position_BGS.gather(2, chosen_BGk).masked_fill(~kept_BGk, torch.iinfo(position_BGS.dtype).max)
    order_BGk = at_BGk.argsort(dim=-1)
    return chosen_BGk.gather(2, order_BGk), kept_BGk.gather(2, order_BGk)

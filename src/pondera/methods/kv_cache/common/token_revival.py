"""Token revival: an auxiliary cache keeps the hidden states of pruned tokens, and a later call can revive them.

In every call a layer may select other tokens. If a selected token has not been through the later layers yet, they
compute it now, from the hidden state in the auxiliary cache; so each layer computes each token at most once.

Shapes: B batch, n tokens that the decoder layer computed, m those and the ones in the auxiliary cache, k of them that
continue, j newly pruned tokens, S slots, K tokens seen, D width of the hidden states, r of the rotary embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.policy import Policy
from pondera.methods.kv_cache.common.token_pruning import PrunedLayer, Selector, SelectorLayer


class ProgressivePruning(Policy):
    """A policy whose layers select in each call the tokens that continue."""

    @abstractmethod
    def choose(self, layer: RevivalLayer, came: Selector) -> Tensor | None:
        """``[B, S]``: which slots of the layer's table belong to tokens that continue; `None`: all slots of the layer.

        Args:
            layer: the selecting layer, whose table contains all tokens of `came`.
            came: the tokens of this call that reach the layer.
        """


@dataclass(frozen=True, kw_only=True)
class RevivingSelector(Selector):
    """A selection that may include tokens of earlier calls.

    Args:
        source_Bk: indices of their hidden states: first those of `came`, then those of the auxiliary cache.
        came: the tokens of this call that reached the layer.
    """

    source_Bk: Tensor
    came: Selector


class RevivalLayer(PrunedLayer, SelectorLayer):
    """A layer that selects in every call, and keeps the hidden states of pruned tokens in an auxiliary cache.

    While tokens may be rolled back, the previous selection remains valid, and all draft tokens continue.

    Attributes:
        stopped: empty, or a table of the pruned tokens, with their hidden states as keys and their rotary embedding as
            values.
        score_BS: score of each slot, while the layer processes a call.
    """

    score_BS: Tensor | None = None

    holds: ClassVar[tuple[str, ...]] = (*KVStoreLayer.holds, "stopped")

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.stopped: list[KVStore] = []

    @property
    def waiting(self) -> Tensor:
        """``[B, s]``: the tokens in the auxiliary cache; negative for empty entries."""
        if self.stopped:
            return self.stopped[0].position[:, 0]
        position = self.tables[0].position
        return position.new_empty(len(position), 0)

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`."""
        came = self.led or Selector.all_of(call)
        out_BTHD = super().attend(call)
        position_BS = self.tables[0].position[:, 0]
        if self.record_past:
            on_BS = self._as_before(position_BS)
        else:
            on_BS = cast(ProgressivePruning, self.method).choose(self, came)
        if on_BS is None:
            self.state.pop("goes_on", None)
            return out_BTHD
        place_BS = torch.where(on_BS, position_BS, self.seen).long()
        present_BK = on_BS.new_zeros(len(on_BS), self.seen + 1).scatter(1, place_BS, True)[:, :-1]
        if not self.record_past:
            self.state["goes_on"] = present_BK
            self.evicted_until = self.seen
        self.choice = self._taken_up(came, present_BK)
        return out_BTHD

    def _as_before(self, position_BS: Tensor) -> Tensor | None:
        """The slots that continued in the last call before the draft tokens, and the draft tokens."""
        before_BK = self.state.get("goes_on")
        if before_BK is None and self.led is None:
            return None
        on_BS = position_BS >= 0
        if self.led is not None:
            on_BS = _among(position_BS, self.led.present_BK)
        if before_BK is None:
            return on_BS
        # All tokens after that call are draft tokens, or were.
        wide_BK = before_BK.new_ones(len(before_BK), self.seen)
        wide_BK[:, : before_BK.shape[1]] = before_BK
        return on_BS & _among(position_BS, wide_BK)

    def _taken_up(self, came: Selector, present_BK: Tensor) -> RevivingSelector:
        position_Bm = torch.cat([came.position_Bk.long(), self.waiting.long()], dim=1)
        position_Bm = position_Bm.masked_fill(~_among(position_Bm, present_BK), EMPTY)
        # A batch of only padding still runs one token.
        source_Bk = _last(position_Bm, least=1)
        position_Bk = position_Bm.gather(1, source_Bk)
        call = (came.begin, came.tokens, came.padding_B)
        return RevivingSelector(position_Bk, *call, packed=True, present_BK=present_BK, source_Bk=source_Bk, came=came)

    def lead(self, h_BTD: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """See `SelectorLayer.lead`: adds the revived tokens, and stores the states of newly pruned ones."""
        choice = cast(RevivingSelector, self.choice)
        if self.led is not None and self.chooser is not None:
            rotary = self.chooser.rotary
        h_B1nD = h_BTD[:, None]
        beside_B1nr = torch.cat([part.expand(len(h_BTD), -1, -1) for part in rotary], dim=-1)[:, None]
        if not self.stopped:
            self.stopped = [KVStore.like(h_B1nD, beside_B1nr, {})]
            self.stopped[0].whole = False
        table = self.stopped[0]
        h_BkD, beside_Bkr = (
            _rows(torch.cat([came, waits], dim=2), choice.source_Bk)[:, 0]
            for came, waits in ((h_B1nD, table.keys), (beside_B1nr, table.values))
        )
        self.rotary = beside_Bkr.split([part.shape[-1] for part in rotary], dim=-1)
        present_BK, came_Bn = choice.present_BK, choice.came.position_Bk
        table.position.masked_fill_(_among(table.position[:, 0], present_BK)[:, None], EMPTY)
        leaves_Bn = came_Bn.masked_fill(_among(came_Bn, present_BK), EMPTY)
        stops_Bj = _last(leaves_Bn)
        if stops_Bj.shape[1]:
            table.append(_rows(h_B1nD, stops_Bj), _rows(beside_B1nr, stops_Bj), leaves_Bn.gather(1, stops_Bj))
        return h_BkD


def _among(position_BS: Tensor, present_BK: Tensor | None) -> Tensor:
    """``[B, S]``: which tokens exist and are visible."""
    real_BS = position_BS >= 0
    return real_BS if present_BK is None else real_BS & present_BK.gather(1, position_BS.clamp(min=0).long())


def _last(position_Bm: Tensor, least: int = 0) -> Tensor:
    """``[B, k]``: the indices of all existing tokens in order, after indices of empty entries in shorter rows."""
    most = max(least, int((position_Bm >= 0).sum(-1).max()))
    return position_Bm.argsort(dim=-1)[:, position_Bm.shape[1] - most :]


def _rows(rows_B1mD: Tensor, place_Bk: Tensor) -> Tensor:
    return rows_B1mD.gather(2, place_Bk[:, None, :, None].expand(-1, 1, -1, rows_B1mD.shape[-1]))

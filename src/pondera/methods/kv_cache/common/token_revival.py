"""Tokens that stopped at a layer and may be taken up again: their hidden states wait where they stopped.

In every call a layer may choose anew which tokens go on. A token that goes on, but has not been through the layers
behind, is run through them now, from the hidden state with which it stopped; so each token is run through each layer
once at most.

Shapes: B batch, n tokens that the decoder layer ran, m those and the ones that wait, k of them that go on, j that stop,
S slots, K tokens seen, D width of the hidden states, r of rotary rows.
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
    """A memory whose layers choose in each call which tokens go on."""

    @abstractmethod
    def choose(self, layer: RevivalLayer, came: Selector) -> Tensor | None:
        """``[B, S]``: which slots of the layer's table hold tokens that go on; none: all that the layer holds, as ever.

        Args:
            layer: that chooses; it holds all that came.
            came: the tokens that this call ran up to here.
        """


@dataclass(frozen=True, kw_only=True)
class RevivingSelector(Selector):
    """A choice of which tokens of earlier calls may be a part.

    Args:
        source_Bk: where their states are: among those of `came`, and behind them those that wait.
        came: what the call ran up to here.
    """

    source_Bk: Tensor
    came: Selector


class RevivalLayer(PrunedLayer, SelectorLayer):
    """A layer that chooses, in every call, and keeps the hidden states of the tokens that stop behind it.

    While tokens may be drafts, the choice of the last call before stands, and all drafts go on.

    Attributes:
        stopped: none, or a table of the tokens that wait; in the place of keys their hidden states, in that of values
            their rotary rows.
        score_BS: while it takes a call in: how its memory ranks the slots.
    """

    score_BS: Tensor | None = None

    holds: ClassVar[tuple[str, ...]] = (*KVStoreLayer.holds, "stopped")

    def __init__(self, method: ProgressivePruning, index: int, among: int) -> None:
        super().__init__(method, index, among)
        self.stopped: list[KVStore] = []

    @property
    def waiting(self) -> Tensor:
        """``[B, s]``: the tokens that have stopped here; negative where there is none."""
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
        """The slots that went on in the last call before drafts, and the drafts."""
        before_BK = self.state.get("goes_on")
        if before_BK is None and self.led is None:
            return None
        on_BS = position_BS >= 0
        if self.led is not None:
            on_BS = _among(position_BS, self.led.present_BK)
        if before_BK is None:
            return on_BS
        # Whatever came behind that call is a draft, or was one.
        wide_BK = before_BK.new_ones(len(before_BK), self.seen)
        wide_BK[:, : before_BK.shape[1]] = before_BK
        return on_BS & _among(position_BS, wide_BK)

    def _taken_up(self, came: Selector, present_BK: Tensor) -> RevivingSelector:
        position_Bm = torch.cat([came.position_Bk.long(), self.waiting.long()], dim=1)
        position_Bm = position_Bm.masked_fill(~_among(position_Bm, present_BK), EMPTY)
        # A batch whose rows are all padding still runs a row.
        source_Bk = _last(position_Bm, least=1)
        position_Bk = position_Bm.gather(1, source_Bk)
        call = (came.begin, came.tokens, came.padding_B)
        return RevivingSelector(position_Bk, *call, packed=True, present_BK=present_BK, source_Bk=source_Bk, came=came)

    def lead(self, h_BTD: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """See `SelectorLayer.lead`: joins those that are taken up, and keeps the states of those that stop."""
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

    def nbytes(self) -> int:
        """See `KVLayer.nbytes`."""
        return super().nbytes() + sum(table.nbytes() for table in self.stopped)

    def select(self, rows: Tensor) -> None:
        """See `KVLayer.select`."""
        super().select(rows)
        for table in self.stopped:
            table.select(rows)

    def clear(self) -> None:
        """See `KVLayer.clear`."""
        super().clear()
        self.stopped = []


def _among(position_BS: Tensor, present_BK: Tensor | None) -> Tensor:
    """``[B, S]``: which tokens are there, and present."""
    real_BS = position_BS >= 0
    return real_BS if present_BK is None else real_BS & present_BK.gather(1, position_BS.clamp(min=0).long())


def _last(position_Bm: Tensor, least: int = 0) -> Tensor:
    """``[B, k]``: the places of all tokens that are there, in their order, behind places of none in rows that have fewer."""
    most = max(least, int((position_Bm >= 0).sum(-1).max()))
    return position_Bm.argsort(dim=-1)[:, position_Bm.shape[1] - most :]


def _rows(rows_B1mD: Tensor, place_Bk: Tensor) -> Tensor:
    return rows_B1mD.gather(2, place_Bk[:, None, :, None].expand(-1, 1, -1, rows_B1mD.shape[-1]))

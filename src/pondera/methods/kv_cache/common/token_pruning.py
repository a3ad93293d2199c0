"""Calls of which only some tokens go on: a layer of a cache chooses them, and the layers behind it see no others.

A layer of a cache can do that by itself: it takes in, attends with and shows to the memory the tokens that go on, and
gives zeros for the rest, which nobody looks at. `leaving_out.py` keeps decoder layers from running the rest at all;
what the layers of the cache do is the same.

Shapes: B batch, H query heads, G KV heads, T new tokens, k those that go on, K tokens seen and new, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pondera.cache.kv_store import EMPTY
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import Cache

MIN_TOKENS = 8
"""Tokens of a call that always go on: less would spare nothing, and a text is scored in pieces of so many."""


@dataclass(frozen=True)
class Selector:
    """The tokens that go on in one call, in the order of the text.

    Args:
        position_Bk: their numbers. Rows with fewer than k begin with `kv_store.EMPTY`, so that all end with the last
            tokens.
        begin: tokens seen before the call.
        tokens: T, of the call.
        padding_B: how many of them are padding.
        packed: decoder layers run those that go on, and no others.
        present_BK: of all tokens seen, those that may be looked at; none: all that a layer holds. Where there is one,
            tokens of earlier calls may be among those that go on.
    """

    position_Bk: Tensor
    begin: int
    tokens: int
    padding_B: Tensor
    packed: bool = False
    present_BK: Tensor | None = None

    @classmethod
    def all_of(cls, call: AttentionCall) -> Selector:
        """Every token of a call that is no padding."""
        position_BT = call.position_BT
        padding_BT = position_BT < 0
        return cls(position_BT.masked_fill(padding_BT, EMPTY), call.start, call.tokens, padding_BT.sum(-1), packed=True)

    def rows(self, given: Tensor, dim: int) -> Tensor:
        """What belongs to the tokens that go on.

        Args:
            given: with one row per token of the call.
            dim: of the tokens; the first is the batch, or 1.
        """
        wide = given.expand(len(self.position_Bk), *given.shape[1:])
        return wide.gather(dim, self._index(wide, dim))

    def mask(self, given_B1TK: Tensor | None) -> Tensor | None:
        """``[B, 1, k, K]``: what they may look at; none: all that came before, as far as a layer holds it.

        Args:
            given_B1TK: the mask of the call.
        """
        if self.present_BK is None:
            return None if given_B1TK is None else self.rows(given_B1TK, 2)
        if self.begin == 0 and given_B1TK is None:
            return None  # the layers hold what is present, and nothing else
        column_K = torch.arange(self.present_BK.shape[1], device=self.position_Bk.device)
        return ((column_K <= self.position_Bk[..., None]) & self.present_BK[:, None])[:, None]

    def put_back(self, rows_Bk: Tensor) -> Tensor:
        """``[B, T, ...]``: their rows at their places in the call, and zeros at all others."""
        nothing_Bk = (self.position_Bk < self.begin).view(*self.position_Bk.shape, *[1] * (rows_Bk.ndim - 2))
        rows_Bk = rows_Bk.masked_fill(nothing_Bk.to(rows_Bk.device), 0)
        rows_BT = rows_Bk.new_zeros(len(rows_Bk), self.tokens, *rows_Bk.shape[2:])
        return rows_BT.scatter_add(1, self._index(rows_Bk, 1), rows_Bk)

    def _index(self, like: Tensor, dim: int) -> Tensor:
        """The places of the tokens in the call, as `gather` and `scatter_add` want them."""
        place_Bk = (self.position_Bk - self.begin).clamp(min=0)
        shape = [len(place_Bk), *[1] * (like.ndim - 1)]
        shape[dim] = place_Bk.shape[1]
        wide = list(like.shape)
        wide[dim] = place_Bk.shape[1]
        return place_Bk.view(shape).expand(wide).to(like.device)


@dataclass(frozen=True)
class PrunedCall(AttentionCall):
    """A call without the tokens that do not go on. `start` is such that the last query has its own number.

    Args:
        choice: those that do.
    """

    choice: Selector = field(kw_only=True)

    @classmethod
    def of(cls, call: AttentionCall, choice: Selector) -> PrunedCall:
        """What goes on of a call, whose queries, keys and values are of those tokens only where they are packed."""
        query, key, value = (
            rows if choice.packed else choice.rows(rows, 2)
            for rows in (call.query_BHTD, call.key_BGTD, call.value_BGTD)
        )
        return cls(
            call.module,
            query,
            key,
            value,
            choice.mask(call.mask_B1TK),
            call.scaling,
            choice.begin + choice.tokens - choice.position_Bk.shape[1],
            call.further,
            call.base,
            choice=choice,
        )

    @property
    def in_order(self) -> bool:
        """See `AttentionCall`: the first of a text are one by themselves, unless a mask speaks of those between them."""
        return self.choice.begin == 0 and self.mask_B1TK is None

    @property
    def position_BT(self) -> Tensor:
        """See `AttentionCall`."""
        return self.choice.position_Bk.to(self.query_BHTD.device)

    @property
    def padding_B(self) -> Tensor | int:
        """See `AttentionCall`: padding does not go on, and is counted all the same."""
        return self.choice.padding_B.to(self.query_BHTD.device)

    def mask(self, part: slice) -> Tensor | None:
        """See `AttentionCall`: always written out, as these queries do not stand side by side."""
        if self.mask_B1TK is not None:
            return super().mask(part)
        column_K = torch.arange(self.start + self.tokens, device=self.query_BHTD.device)
        return (column_K <= self.position_BT[:, part, None])[:, None]


class SelectorLayer(KVStoreLayer):
    """The layer that chooses which tokens go on; a memory may have it do so in `Policy.evict_layer`.

    Attributes:
        choice: those of the call that is running; none: all.
        new_BT: while it takes a call in: the positions of the call's tokens.
        packs: the decoder layers behind it leave the other tokens out.
        rotary: while decoder layers behind it run: what they turn the queries and keys of those that go on by.
    """

    choice: Selector | None = None
    new_BT: Tensor | None = None
    packs: bool = False
    rotary: tuple[Tensor, ...] = ()

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`."""
        self.choice, self.new_BT = None, call.position_BT
        out_BTHD = super().attend(call)
        self.new_BT = None
        return out_BTHD

    def lead(self, h_BTD: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Hidden states of the tokens that go on, between the decoder layer of this one and the next.

        Args:
            h_BTD: what the decoder layer gave.
            rotary: of the call's tokens, ``[B or 1, T, r]`` each.
        """
        assert self.choice is not None
        self.rotary = tuple(self.choice.rows(part_BTr, 1) for part_BTr in rotary)
        return self.choice.rows(h_BTD, 1)

    def clear(self) -> None:
        """See `KVLayer.clear`."""
        super().clear()
        self.choice = self.new_BT = None
        self.rotary = ()


class PrunedLayer(KVStoreLayer):
    """A layer behind one that chooses: it takes in what went on, as if there were nothing else.

    Attributes:
        chooser: the layer of the same cache that chooses; none: nothing before this layer does.
    """

    chooser: SelectorLayer | None = None

    @property
    def led(self) -> Selector | None:
        """Which tokens of the call that is running come here; none: all."""
        return None if self.chooser is None else self.chooser.choice

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `KVLayer.update`: all tokens of the call have been seen, whichever come here."""
        found = super().update(key_states, value_states, *args, **kwargs)
        if self.chooser is not None:
            self.seen = self.chooser.seen
        return found

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`; tokens that do not go on look at nothing, and get zeros."""
        choice = self.led
        if choice is None:
            return super().attend(call)
        if choice.packed and call.tokens != choice.position_Bk.shape[1]:
            raise UserError("this cache was made for another model; make one for this model: memory.cache(model)")
        self.prompt = self.seen
        out_BkHD = super().attend(PrunedCall.of(call, choice))
        if not self.record_past:
            self.evicted_until = self.seen
        for table in self.tables:
            table.whole = False
        return out_BkHD if choice.packed else choice.put_back(out_BkHD)


def link(cache: Cache) -> None:
    """Shows the layers of a cache that stand behind one that chooses which one that is: of several the nearest."""
    chooser = None
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer):
            layer.chooser = chooser
        if isinstance(layer, SelectorLayer):
            chooser = layer

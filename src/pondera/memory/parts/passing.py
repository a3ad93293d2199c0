"""Prompts of which only some tokens go on: one layer of a cache chooses them, and the layers behind it see no others.

A layer of a cache can do that by itself: it takes in, attends with and shows to the memory the tokens that go on, and gives
zeros for the rest, which nobody looks at. `leaving_out.py` keeps decoder layers from running the rest at all; what the
layers of the cache do is the same.

Shapes: B batch, H query heads, G KV heads, T new tokens, k those that go on, K tokens seen and new, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pondera.memory.parts.layer import Call
from pondera.memory.parts.slot_layer import SlotLayer
from pondera.model.hf import Cache


@dataclass(frozen=True)
class Choice:
    """The tokens of one call that go on, in the order of the text.

    Args:
        position_Bk: their numbers. Rows with fewer than k begin with `slot_table.EMPTY`, so that all end with the last tokens.
        begin: tokens seen before the call.
        tokens: T, of the call.
        padding_B: how many of them are padding.
    """

    position_Bk: Tensor
    begin: int
    tokens: int
    padding_B: Tensor

    def rows(self, given: Tensor, dim: int) -> Tensor:
        """What belongs to the tokens that go on.

        Args:
            given: with one row per token of the call; or with those that go on only, which is returned as it is.
            dim: of the tokens; the first is the batch, or 1.
        """
        if given.shape[dim] != self.tokens:
            return given
        wide = given.expand(len(self.position_Bk), *given.shape[1:])
        return wide.gather(dim, self._index(wide, dim))

    def put_back(self, rows_Bk: Tensor) -> Tensor:
        """``[B, T, ...]``: their rows at their places in the call, and zeros at all others."""
        nothing_Bk = (self.position_Bk < 0).view(*self.position_Bk.shape, *[1] * (rows_Bk.ndim - 2))
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
class Passed(Call):
    """A call without the tokens that do not go on. `start` is such that the last query has its own number.

    Args:
        choice: those that do.
    """

    choice: Choice

    @classmethod
    def of(cls, call: Call, choice: Choice) -> Passed:
        """What goes on of a call, whose queries, keys and values may be of those tokens only already."""
        mask_B1TK = call.mask_B1TK
        return cls(
            call.module,
            choice.rows(call.query_BHTD, 2),
            choice.rows(call.key_BGTD, 2),
            choice.rows(call.value_BGTD, 2),
            None if mask_B1TK is None else choice.rows(mask_B1TK, 2),
            call.scaling,
            choice.begin + choice.tokens - choice.position_Bk.shape[1],
            call.further,
            choice,
        )

    @property
    def in_order(self) -> bool:
        """See `Call`: the first of a text are one by themselves, unless a mask speaks of those between them."""
        return self.choice.begin == 0 and self.mask_B1TK is None

    @property
    def position_BT(self) -> Tensor:
        """See `Call`."""
        return self.choice.position_Bk.to(self.query_BHTD.device)

    @property
    def padding_B(self) -> Tensor | int:
        """See `Call`: padding does not go on, and is counted all the same."""
        return self.choice.padding_B.to(self.query_BHTD.device)

    def mask(self, part: slice) -> Tensor | None:
        """See `Call`: always written out, as these queries do not stand side by side."""
        if self.mask_B1TK is not None:
            return super().mask(part)
        column_K = torch.arange(self.start + self.tokens, device=self.query_BHTD.device)
        return (column_K <= self.position_BT[:, part, None])[:, None]


class ChoosingLayer(SlotLayer):
    """The layer whose memory chooses, in `Slots.settle`, which tokens of a prompt go on.

    Attributes:
        choice: those of the call that is running; none: all.
        new_BT: while it takes a call in: the positions of the call's tokens.
        packs: the decoder layers behind it leave the other tokens out.
    """

    choice: Choice | None = None
    new_BT: Tensor | None = None
    packs: bool = False

    def attend(self, call: Call) -> Tensor:
        """See `MemoryLayer.attend`."""
        self.choice, self.new_BT = None, call.position_BT
        out_BTHD = super().attend(call)
        self.new_BT = None
        return out_BTHD

    def clear(self) -> None:
        """See `MemoryLayer.clear`."""
        super().clear()
        self.choice = self.new_BT = None


class PassedLayer(SlotLayer):
    """A layer behind the one that chooses: of a prompt it takes in what went on, as if there were nothing else.

    Attributes:
        chooser: the layer of the same cache that chooses.
    """

    chooser: ChoosingLayer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `MemoryLayer.update`: all tokens of the call have been seen, whichever come here."""
        found = super().update(key_states, value_states, *args, **kwargs)
        self.seen = self.chooser.seen
        return found

    def attend(self, call: Call) -> Tensor:
        """See `MemoryLayer.attend`; tokens that do not go on look at nothing, and get zeros."""
        choice = self.chooser.choice
        if choice is None:
            return super().attend(call)
        self.prompt = self.seen
        out_BkHD = super().attend(Passed.of(call, choice))
        self.forgotten = self.seen
        for table in self.tables:
            table.whole = False
        return out_BkHD if call.tokens != choice.tokens else choice.put_back(out_BkHD)


def link(cache: Cache) -> ChoosingLayer | None:
    """Shows the layers of a cache that stand behind one that chooses which one that is; returns it, if there is one."""
    chooser = next((layer for layer in cache.layers if isinstance(layer, ChoosingLayer)), None)
    for layer in cache.layers:
        if isinstance(layer, PassedLayer) and chooser is not None:
            layer.chooser = chooser
    return chooser

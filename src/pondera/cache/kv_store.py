"""The rows that one decoder layer keeps of the past, and where in the text each of them stands.

A **slot** is one KV row. Once something has been evicted_until, a slot's place in storage says nothing about its place in the
text, so that is noted beside it.

Shapes: B batch, G KV heads, S slots, T new tokens, k chosen slots, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int32).min
"""Position of a slot that holds nothing."""


@dataclass
class KVStore:
    """Keys, values, positions and whatever a memory notes about each slot, for some of the KV heads of a layer.

    Storage is allocated ahead, so that a token more costs no copy; a slot that was forgotten is filled by the next token.
    The order of slots means nothing.

    Args:
        keys_BGSD, values_BGSD: storage, of which the first `used` slots count.
        position_BGS: int32. The number of the token in its text, padding counted; ``-1 - number`` where it is padding;
            `EMPTY` where there is nothing.
        notes: further numbers per slot, ``[B, G, S]`` each, by name; what a slot starts with is `note_defaults`.
        fresh: by the names of notes.
        used: slots in use.
        whole: slot i holds token i of every row: nothing has been forgotten yet.
    """

    keys_BGSD: Tensor
    values_BGSD: Tensor
    position_BGS: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)
    note_defaults: dict[str, float] = field(default_factory=dict)
    used: int = 0
    whole: bool = True

    @classmethod
    def like(cls, key_BGTD: Tensor, value_BGTD: Tensor, note_defaults: dict[str, float]) -> KVStore:
        """An empty table for such keys and values."""
        B, G = key_BGTD.shape[:2]
        nothing = key_BGTD.new_empty(B, G, 0)
        return cls(
            key_BGTD.new_empty(B, G, 0, key_BGTD.shape[-1]),
            value_BGTD.new_empty(B, G, 0, value_BGTD.shape[-1]),
            nothing.to(torch.int32),
            {name: nothing.float() for name in note_defaults},
            note_defaults,
        )

    @property
    def keys(self) -> Tensor:
        """``[B, G, S, D]``: the slots in use."""
        return self.keys_BGSD[:, :, : self.used]

    @property
    def values(self) -> Tensor:
        """``[B, G, S, D]``."""
        return self.values_BGSD[:, :, : self.used]

    @property
    def position(self) -> Tensor:
        """``[B, G, S]``."""
        return self.position_BGS[:, :, : self.used]

    def note(self, name: str) -> Tensor:
        """``[B, G, S]``: a view that can be written to."""
        return self.notes[name][:, :, : self.used]

    @property
    def real(self) -> Tensor:
        """``[B, G, S]``: which slots hold a token that is no padding."""
        return self.position_BGS[:, :, : self.used] >= 0

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor, position_BT: Tensor) -> None:
        """Takes in new tokens.

        Args:
            key_BGTD, value_BGTD: their rows.
            position_BT: as `position_BGS`.
        """
        B, G, T = key_BGTD.shape[:3]
        new = {
            "keys_BGSD": key_BGTD,
            "values_BGSD": value_BGTD,
            "position_BGS": position_BT[:, None].expand(B, G, T).to(torch.int32),
        }
        free_BGT = self._free(T) if not self.whole and self.used else None
        if free_BGT is not None:
            for name, rows in new.items():
                getattr(self, name).scatter_(2, _as_wide(free_BGT, rows), rows)
            for name, start in self.note_defaults.items():
                self.notes[name].scatter_(2, free_BGT, start)
            return
        self.reserve(self.used + T)
        end = slice(self.used, self.used + T)
        for name, rows in new.items():
            getattr(self, name)[:, :, end] = rows
        for name, start in self.note_defaults.items():
            self.notes[name][:, :, end] = start
        self.used += T

    def _free(self, count: int) -> Tensor | None:
        """``[B, G, count]``: slots that hold nothing, if every row has as many."""
        if count > self.used:
            return None
        lowest_BGT, slot_BGT = self.position.topk(count, largest=False)  # no number is below that of an empty slot
        return slot_BGT if bool((lowest_BGT == EMPTY).all()) else None

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots, with an eighth to spare, so that it seldom has to."""
        if slots <= self.keys_BGSD.shape[2]:
            return
        room = slots + max(16, slots // 8)
        self._resize(room)

    def _resize(self, room: int) -> None:
        for name in ("keys_BGSD", "values_BGSD", "position_BGS"):
            setattr(self, name, _resized(getattr(self, name), self.used, room))
        self.notes = {name: _resized(note, self.used, room) for name, note in self.notes.items()}

    def evict(self, slot_BGk: Tensor) -> None:
        """Empties these slots, leaving holes for tokens to come."""
        self.position.scatter_(2, slot_BGk, EMPTY)
        self.whole = False

    def keep(self, slot_BGk: Tensor, kept_BGk: Tensor) -> None:
        """Moves these slots into storage of just their size, and frees the rest.

        Args:
            slot_BGk: the slots.
            kept_BGk: false where a row has fewer than k to keep.
        """
        self.keys_BGSD = self.keys.gather(2, _as_wide(slot_BGk, self.keys))
        self.values_BGSD = self.values.gather(2, _as_wide(slot_BGk, self.values))
        self.position_BGS = torch.where(kept_BGk, self.position.gather(2, slot_BGk), EMPTY)
        self.notes = {name: self.note(name).gather(2, slot_BGk) for name in self.notes}
        self.used, self.whole = slot_BGk.shape[2], False

    def crop(self, tokens: int) -> None:
        """Forgets the tokens from this number on."""
        position = self.position
        number_BGS = torch.where(position < 0, -1 - position, position)
        position.masked_fill_(number_BGS >= tokens, EMPTY)  # of an empty slot the number is the largest there is
        held_S = (position != EMPTY).flatten(0, 1).any(0)
        last = held_S.nonzero()
        used = int(last[-1]) + 1 if len(last) else 0
        self.whole = self.whole and used == tokens
        self.used = used

    def renumber(self, keep_C: Tensor, number_C: Tensor) -> None:
        """Empties the slots of tokens that go, and gives the others their new numbers.

        Args:
            keep_C: which tokens stay, of all seen.
            number_C: the new number of each token, and one entry more.
        """
        position, end = self.position, len(keep_C)
        at = torch.where(position >= 0, position, end).long()
        keep = torch.cat([keep_C, keep_C.new_zeros(1)])[at]
        position.copy_(torch.where(keep, number_C[at], EMPTY))
        self.whole = self.whole and bool(keep_C.all())

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        rows = rows.to(self.keys_BGSD.device)
        for name in ("keys_BGSD", "values_BGSD", "position_BGS"):
            setattr(self, name, getattr(self, name)[rows])
        self.notes = {name: note[rows] for name, note in self.notes.items()}

    def split_heads(self) -> list[KVStore]:
        """A table for each head, so that each can have a size of its own."""

        def part(rows: Tensor, head: int) -> Tensor:
            return rows[:, head : head + 1].clone()

        return [
            KVStore(
                part(self.keys_BGSD, head),
                part(self.values_BGSD, head),
                part(self.position_BGS, head),
                {name: part(note, head) for name, note in self.notes.items()},
                self.note_defaults,
                self.used,
                self.whole,
            )
            for head in range(self.keys_BGSD.shape[1])
        ]

    def nbytes(self) -> int:
        """Bytes of the storage, spare room included."""
        held = [self.keys_BGSD, self.values_BGSD, self.position_BGS, *self.notes.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _as_wide(slot_BGk: Tensor, rows: Tensor) -> Tensor:
    """Indices of slots as `gather` and `scatter_` want them for rows of any width."""
    return slot_BGk if rows.ndim == 3 else slot_BGk[..., None].expand(*slot_BGk.shape, rows.shape[-1])


def _resized(rows: Tensor, used: int, room: int) -> Tensor:
    resized = rows.new_empty(*rows.shape[:2], room, *rows.shape[3:])
    resized[:, :, :used] = rows[:, :, :used]
    return resized

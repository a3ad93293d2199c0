"""Storage for the KV slots of one decoder layer: keys, values and the position of each slot's token.

After an eviction, the index of a slot in storage no longer determines its token, so the store has a position for each slot.

Shapes: B batch, G KV heads, S slots, T new tokens, k chosen slots, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pondera.cache.native_attention import Attended, Attending
from pondera.cache.native_place import Placing
from pondera.cache.state import BatchState

EMPTY = torch.iinfo(torch.int32).min
"""Position of an empty slot."""


@dataclass(eq=False)
class KVStore(BatchState):
    """Keys, values, positions and metadata of KV slots, for some of the KV heads of a layer.

    Storage is preallocated, so that appending a token needs no copy; later tokens reuse the slots of evicted ones. The order
    of slots has no meaning.

    Args:
        keys_BGSD, values_BGSD: storage; the first `used` slots are in use.
        position_BGS: int32. The index of the token in its batch row, padding counted; ``-1 - index`` for a padding token;
            `EMPTY` for an empty slot.
        notes: metadata of a policy, such as scores, ``[B, G, S]`` each, by name.
        note_defaults: the initial value of each note in a new slot, by name.
        used: the number of slots in use.
        whole: whether slot i contains token i in every batch row, that is, whether no token has been evicted.
        first_head: the index of its first KV head in the layer; the others follow.

    Attributes:
        heads, part: the indices of its KV heads in the layer, as a list and as a slice.
    """

    keys_BGSD: Tensor
    values_BGSD: Tensor
    position_BGS: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)
    note_defaults: dict[str, float] = field(default_factory=dict)
    used: int = 0
    whole: bool = True
    first_head: int = 0

    def __post_init__(self) -> None:
        self.derive()

    def derive(self) -> None:
        """See `BatchState.derive`: its heads."""
        self.part = slice(self.first_head, self.first_head + self.keys_BGSD.shape[1])
        self.heads = list(range(self.part.start, self.part.stop))
        self._placing: Placing | None = None
        self._attending: Attending | None = None

    @classmethod
    def like(cls, key_BGTD: Tensor, value_BGTD: Tensor, note_defaults: dict[str, float]) -> KVStore:
        """An empty store with the batch size, heads, widths and dtypes of these keys and values."""
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
        """``[B, G, S, D]``: the keys of the slots in use, a view."""
        return self.keys_BGSD[:, :, : self.used]

    @property
    def values(self) -> Tensor:
        """``[B, G, S, D]``: the values of the slots in use, a view."""
        return self.values_BGSD[:, :, : self.used]

    @property
    def position(self) -> Tensor:
        """``[B, G, S]``: the positions of the slots in use, a view."""
        return self.position_BGS[:, :, : self.used]

    @property
    def note(self) -> dict[str, Tensor]:
        """``[B, G, S]`` each: writable views of the notes of the slots in use, by name."""
        return {name: note[:, :, : self.used] for name, note in self.notes.items()}

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """`keys` and `values`."""
        return self.keys, self.values

    @property
    def real(self) -> Tensor:
        """``[B, G, S]``: true for slots of tokens that are not padding."""
        return self.position >= 0

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor, position: Tensor | int) -> None:
        """Stores the keys and values of new tokens: in empty slots if all of them fit there, else after the last slot.

        Args:
            key_BGTD, value_BGTD: the keys and values.
            position: ``[B, T]``, positions in the form of `position_BGS`; or the position of one token, in all batch rows.
        """
        B, G, T = key_BGTD.shape[:3]
        if not isinstance(position, Tensor):
            if self._place(key_BGTD, value_BGTD, position):
                return
            position = torch.full((1, 1), position, device=key_BGTD.device)
        position_BGT = position[:, None].expand(B, G, T).to(torch.int32)
        free_BGT = None
        if not self.whole and 0 < T <= self.used:
            lowest_BGT, slot_BGT = self.position.topk(T, largest=False)  # EMPTY is the lowest position
            free_BGT = slot_BGT if bool((lowest_BGT == EMPTY).all()) else None
        if free_BGT is None:
            self._extend(key_BGTD, value_BGTD, position_BGT)
        else:
            self.keys_BGSD.scatter_(2, free_BGT[..., None].expand_as(key_BGTD), key_BGTD)
            self.values_BGSD.scatter_(2, free_BGT[..., None].expand_as(value_BGTD), value_BGTD)
            self.position_BGS.scatter_(2, free_BGT, position_BGT)
            for name, start in self.note_defaults.items():
                self.notes[name].scatter_(2, free_BGT, start)

    def _place(self, key_BG1D: Tensor, value_BG1D: Tensor, number: int) -> bool:
        """`append` of one token with a kernel; false if no kernel supports it."""
        used = self._placed(key_BG1D, value_BG1D, number)
        if used == -1:
            self._reserve(self.used + 1)
            used = self._placed(key_BG1D, value_BG1D, number)
        if used is None:
            return False
        self.used = used
        return True

    def _placed(self, key_BG1D: Tensor, value_BG1D: Tensor, number: int) -> int | None:
        placing = self._placing
        if placing is None or not self._stored_in(placing.storage, placing.notes):
            notes = [(self.notes[name], start) for name, start in self.note_defaults.items()]
            placing = self._placing = Placing((self.keys_BGSD, self.values_BGSD, self.position_BGS), notes)
        return placing(key_BG1D, value_BG1D, number, self.used, not self.whole)

    def _stored_in(self, storage: tuple[Tensor, Tensor, Tensor], notes: Sequence[Tensor]) -> bool:
        """Whether a call was prepared for this storage."""
        own = (self.keys_BGSD, self.values_BGSD, self.position_BGS, *(self.notes.values() if notes else ()))
        for one, other in zip(own, (*storage, *notes), strict=True):
            if one is not other:
                return False
        return True

    def attend(
        self, query_BGR1D: Tensor, start: int, scaling: float, with_scores: bool = False, slot_BGk: Tensor | None = None
    ) -> Attended | None:
        """`attend_natively` of one token without a mask to the slots in use."""
        attending = self._attending
        if attending is None or not self._stored_in(attending.storage, ()):
            attending = self._attending = Attending((self.keys_BGSD, self.values_BGSD, self.position_BGS))
        return attending(query_BGR1D, self.used, start, scaling, with_scores, slot_BGk)

    def _extend(self, key_BGTD: Tensor, value_BGTD: Tensor, position_BGT: Tensor) -> None:
        """Stores new tokens after the last slot in use."""
        end = slice(self.used, self.used + key_BGTD.shape[2])
        if end.stop > self.keys_BGSD.shape[2]:
            self._reserve(end.stop)
        self.keys_BGSD[:, :, end], self.values_BGSD[:, :, end] = key_BGTD, value_BGTD
        self.position_BGS[:, :, end] = position_BGT
        for name, start in self.note_defaults.items():
            self.notes[name][:, :, end] = start
        self.used = end.stop

    def _reserve(self, slots: int) -> None:
        """Allocates storage for this number of slots, and an eighth more, so that it is seldom called again."""
        room = slots + max(16, slots // 8)
        for name in ("keys_BGSD", "values_BGSD", "position_BGS"):
            setattr(self, name, _resized(getattr(self, name), self.used, room))
        self.notes = {name: _resized(note, self.used, room) for name, note in self.notes.items()}

    def evict(self, slot_BGk: Tensor) -> None:
        """Evicts these slots; later tokens reuse them."""
        self.position.scatter_(2, slot_BGk, EMPTY)
        self.whole = False

    def keep(self, slot_BGk: Tensor, kept_BGk: Tensor) -> None:
        """Copies these slots into storage of exactly their size, and evicts the others.

        Args:
            slot_BGk: indices of the slots.
            kept_BGk: false for an entry that only pads `slot_BGk`; its slot becomes empty.
        """
        self.keys_BGSD = self.keys.gather(2, _as_wide(slot_BGk, self.keys))
        self.values_BGSD = self.values.gather(2, _as_wide(slot_BGk, self.values))
        self.position_BGS = torch.where(kept_BGk, self.position.gather(2, slot_BGk), EMPTY)
        self.notes = {name: note.gather(2, slot_BGk) for name, note in self.note.items()}
        self.used, self.whole = slot_BGk.shape[2], False

    def truncate(self, tokens: int) -> None:
        """Rolls back to the first `tokens` tokens: empties the slots of later ones."""
        position = self.position
        number_BGS = torch.where(position < 0, -1 - position, position)
        position.masked_fill_(number_BGS >= tokens, EMPTY)  # an empty slot has the largest number
        held_S = (position != EMPTY).flatten(0, 1).any(0)
        last = held_S.nonzero()
        used = int(last[-1]) + 1 if len(last) else 0
        self.whole = self.whole and used == tokens
        self.used = used

    def renumber(self, keep_C: Tensor, number_C: Tensor) -> None:
        """Empties the slots of removed tokens, and sets the new positions of the others.

        Args:
            keep_C: for each token seen, whether it stays.
            number_C: the new index of each token, and one unused entry.
        """
        position, end = self.position, len(keep_C)
        at = torch.where(position >= 0, position, end).long()
        keep = torch.cat([keep_C, keep_C.new_zeros(1)])[at]
        position.copy_(torch.where(keep, number_C[at], EMPTY))
        self.whole = self.whole and bool(keep_C.all())

    def split_heads(self) -> list[KVStore]:
        """One store for each KV head, so that heads can have different numbers of slots."""

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
                head,
            )
            for head in range(self.keys_BGSD.shape[1])
        ]


def _as_wide(slot_BGk: Tensor, rows: Tensor) -> Tensor:
    """Expands indices of slots to the shape of `rows`, for `gather` and `scatter_`."""
    return slot_BGk if rows.ndim == 3 else slot_BGk[..., None].expand(*slot_BGk.shape, rows.shape[-1])


def _resized(rows: Tensor, used: int, room: int) -> Tensor:
    resized = rows.new_empty(*rows.shape[:2], room, *rows.shape[3:])
    resized[:, :, :used] = rows[:, :, :used]
    return resized

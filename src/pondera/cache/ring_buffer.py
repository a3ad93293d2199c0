"""A ring buffer for the exact keys and values of the most recent tokens; appending a token needs no copy.

Shapes: B batch, G KV heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pondera.cache.state import BatchState


@dataclass
class RingBuffer(BatchState):
    """Keys and values of the tokens with index `first` to ``end - 1``, padding counted.

    Args:
        keys, values: storage, ``[B, G, room, D]``; token n has index ``(n - origin) % room``.
        first, end, origin: indices of tokens.
        borrowed: whether the storage belongs to the caller, so that the buffer must not write to it.
    """

    keys: Tensor
    values: Tensor
    first: int = 0
    end: int = 0
    origin: int = 0
    borrowed: bool = False

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def room(self) -> int:
        """The number of tokens for which storage is allocated."""
        return self.keys.shape[2]

    def append(self, key_BG1D: Tensor, value_BG1D: Tensor) -> None:
        """Appends one token."""
        tokens = self.end - self.first
        if self.borrowed or tokens == self.room:
            self.resize(tokens + max(16, tokens // 8))
        at = (self.end - self.origin) % self.room
        self.keys[:, :, at : at + 1], self.values[:, :, at : at + 1] = key_BG1D, value_BG1D
        self.end += 1

    def extend(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends several tokens; returns all keys and values in order. An empty buffer does not copy them."""
        tokens = key_BGTD.shape[2]
        if len(self):
            keys, values = self.read(self.first, self.end)
            key_BGTD, value_BGTD = torch.cat([keys, key_BGTD], 2), torch.cat([values, value_BGTD], 2)
        self.keys, self.values, self.origin, self.borrowed = key_BGTD, value_BGTD, self.first, True
        self.end += tokens
        return key_BGTD, value_BGTD

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields one or two views of the tokens from `start` to ``stop - 1``: first index, keys, values."""
        room = self.room
        while start < stop:
            at = (start - self.origin) % room
            count = min(stop - start, room - at)
            yield start, self.keys[:, :, at : at + count], self.values[:, :, at : at + count]
            start += count

    def read(self, start: int, stop: int, row: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens from `start` to ``stop - 1``, in order."""
        pieces = [(keys[row], values[row]) for _, keys, values in self.pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:
            return self.keys[row, :, :0], self.values[row, :, :0]
        keys, values = zip(*pieces, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def resize(self, room: int) -> None:
        """Copies the rows into new storage for `room` tokens."""
        for name, rows in zip(("keys", "values"), self.read(self.first, self.end), strict=True):
            storage = rows.new_empty(*rows.shape[:2], room, rows.shape[-1])
            storage[:, :, : len(self)] = rows
            setattr(self, name, storage)
        self.origin, self.borrowed = self.first, False

    def drop(self, first: int) -> None:
        """Deletes the tokens before index `first`."""
        self.first = min(max(first, self.first), self.end)

    def truncate(self, end: int) -> None:
        """Deletes the tokens from index `end` on."""
        self.end = min(self.end, end)
        self.first = min(self.first, self.end)

"""The latest rows of a text, exactly, in storage that they go round in: a token more costs no copy.

Shapes: B batch, G KV heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RingBuffer:
    """Rows of the tokens from number `first` to before number `end`, padding counted.

    Args:
        keys, values: storage, ``[B, G, room, D]``; token n stands at place ``(n - origin) % room``.
        first, end, origin: numbers of tokens.
        borrowed: the storage is somebody else's, so that it may be read and not written.
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
        """Tokens that there is room for."""
        return self.keys.shape[2]

    def append(self, key_BG1D: Tensor, value_BG1D: Tensor) -> None:
        """Takes in one token."""
        if self.borrowed or len(self) == self.room:
            self.resize(len(self) + max(16, len(self) // 8))
        at = (self.end - self.origin) % self.room
        self.keys[:, :, at : at + 1], self.values[:, :, at : at + 1] = key_BG1D, value_BG1D
        self.end += 1

    def extend(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in several tokens, without a copy where there were none; returns all rows in the order of the text."""
        tokens = key_BGTD.shape[2]
        if len(self):
            keys, values = self.read(self.first, self.end)
            key_BGTD, value_BGTD = torch.cat([keys, key_BGTD], 2), torch.cat([values, value_BGTD], 2)
        self.keys, self.values, self.origin, self.borrowed = key_BGTD, value_BGTD, self.first, True
        self.end += tokens
        return key_BGTD, value_BGTD

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Views of the rows of some tokens: one, or two where they go round the end; with the first number of each."""
        while start < stop:
            at = (start - self.origin) % self.room
            count = min(stop - start, self.room - at)
            yield start, self.keys[:, :, at : at + count], self.values[:, :, at : at + count]
            start += count

    def read(self, start: int, stop: int, row: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rows of some tokens, in the order of the text."""
        found = [(keys[row], values[row]) for _, keys, values in self.pieces(start, stop)]
        if len(found) == 1:
            return found[0]
        if not found:
            return self.keys[row, :, :0], self.values[row, :, :0]
        keys, values = zip(*found, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def resize(self, room: int) -> None:
        """Moves the rows into storage of its own for so many tokens."""
        for name, rows in zip(("keys", "values"), self.read(self.first, self.end), strict=True):
            fresh = rows.new_empty(*rows.shape[:2], room, rows.shape[-1])
            fresh[:, :, : len(self)] = rows
            setattr(self, name, fresh)
        self.origin, self.borrowed = self.first, False

    def drop(self, first: int) -> None:
        """Forgets the tokens before this one."""
        self.first = min(max(first, self.first), self.end)

    def crop(self, end: int) -> None:
        """Forgets the tokens from this one on."""
        self.end = min(self.end, end)
        self.first = min(self.first, self.end)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        rows = rows.to(self.keys.device)
        self.keys, self.values, self.borrowed = self.keys[rows], self.values[rows], False

"""How rows of a cache become codes and back: what a `Regions` memory is given for its keys, and for its values.

Shapes: B batch, G KV heads, S tokens, D head width, N queries of a KV head (query heads and new tokens together).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

Parts = dict[str, Tensor]
"""What codes are kept as, by name: ``[B, heads, S / tokens of an entry, ...]`` each."""


class Codec(ABC):
    """Codes for rows ``[B, G, S, D]``. It has no state of a text; one serves every cache of its layer.

    Attributes:
        unit: so many consecutive tokens are coded together, and `encode` is given multiples of them.
        needs_position: codes depend on where in its text a token stands.
        queries: up to so many queries `dot` and `mix` are faster than products with what `decode` gives; 0: never.
    """

    unit: int = 1
    needs_position: bool = False
    queries: int = 0

    @abstractmethod
    def entry(self, name: str) -> int:
        """Tokens that an entry of this tensor is for: 1, or `unit` for what they share."""

    @abstractmethod
    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None) -> Parts:
        """Codes of rows.

        Args:
            x_BGSD: keys after rotary embedding, or values.
            position_BS: position ids, where `needs_position`.
        """

    @abstractmethod
    def decode(self, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """``[B, G, S, D]``: the rows that codes stand for, in float32 at least."""

    def dot(self, query_BGND: Tensor, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """``[B, G, N, S]``: products of queries and decoded rows."""
        rows_BGSD = self.decode(parts, position_BS)
        return query_BGND.to(rows_BGSD.dtype) @ rows_BGSD.mT

    def mix(self, weight_BGNS: Tensor, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """``[B, G, N, D]``: decoded rows, weighed and summed."""
        rows_BGSD = self.decode(parts, position_BS)
        return weight_BGNS.to(rows_BGSD.dtype) @ rows_BGSD


@dataclass
class Codes:
    """The codes of one tensor of a layer, in storage that is allocated ahead.

    Args:
        parts: storage; see `Parts`. Column c of a row is its c-th coded token, whatever padding stands before it.
        room: tokens that there is room for.
        used: tokens of the longest row.
    """

    parts: Parts = field(default_factory=dict)
    room: int = 0
    used: int = 0

    def write(self, coder: Codec, new: Parts, row: slice, start: int, tokens: int, rows: int) -> None:
        """Puts codes of new tokens in their place.

        Args:
            coder: that made them.
            new: codes of ``tokens`` tokens for the rows of the slice.
            row: of the batch.
            start: the first token's number among the coded ones.
            tokens: how many.
            rows: of the batch.
        """
        self._reserve(coder, new, start + tokens, rows)
        self.used = max(self.used, start + tokens)
        for name, entries in new.items():
            size = coder.entry(name)
            self.parts[name][row, :, start // size : (start + tokens) // size] = entries

    def _reserve(self, coder: Codec, like: Parts, tokens: int, rows: int) -> None:
        if tokens <= self.room:
            return
        room = tokens if not self.room else tokens + max(16, tokens // 8)
        self.room = -(-room // coder.unit) * coder.unit
        for name, entries in like.items():
            size = coder.entry(name)
            shape = (rows, entries.shape[1], self.room // size, *entries.shape[3:])
            grown = entries.new_zeros(shape)  # zeros, as rows of a batch may be shorter
            if name in self.parts:
                grown[:, :, : self.used // size] = self.parts[name][:, :, : self.used // size]
            self.parts[name] = grown

    def view(self, coder: Codec) -> Parts:
        """The codes in use."""
        return {name: part[:, :, : -(-self.used // coder.entry(name))] for name, part in self.parts.items()}

    def crop(self, used: int) -> None:
        """Forgets what the longest row no longer has."""
        self.used = min(self.used, used)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        self.parts = {name: part[rows.to(part.device)] for name, part in self.parts.items()}

    def live_bytes(self, coder: Codec) -> int:
        """Bytes of the codes in use, spare room left out."""
        return sum(part.numel() * part.element_size() for part in self.view(coder).values())

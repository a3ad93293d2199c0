"""Codecs that encode keys or values of a KV cache and decode them, and storage for the codes.

Shapes: B batch, G KV heads, S tokens, D head width, N queries of a KV head (query heads and new tokens together).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pondera.cache.native_sections import Rows
from pondera.cache.state import BatchState

Parts = dict[str, Tensor]
"""The tensors that hold codes, by name: ``[B, heads, S / tokens per entry, ...]`` each."""


class Codec(ABC):
    """Encodes keys or values ``[B, G, S, D]``. It stores nothing about a sequence; all caches of a layer share one codec.

    Attributes:
        unit: the number of consecutive tokens that are coded together; `encode` takes multiples of it.
        needs_position: whether codes depend on the position of a token.
        alike: whether it codes all heads and positions alike, so that it can code any selection of slots.
        queries: the number of queries up to which `dot` and `mix` are faster than products with decoded rows; 0: never.
    """

    unit: int = 1
    needs_position: bool = False
    alike: bool = False
    queries: int = 0

    @abstractmethod
    def entry(self, name: str) -> int:
        """Tokens per entry of this tensor: 1, or `unit` for a tensor that the tokens of a unit share."""

    @abstractmethod
    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None) -> Parts:
        """Encodes keys or values.

        Args:
            x_BGSD: keys after rotary embedding, or values.
            position_BS: position ids if `needs_position`, else `None`.
        """

    @abstractmethod
    def decode(self, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """Decodes codes to keys or values, ``[B, G, S, D]``, in float32 or wider."""

    def kernel_rows(self, parts: Parts, first: Sequence[int] | None, keys: bool = False) -> Rows | None:
        """The codes for `attend_natively_to_sections`; default: `None`, it cannot read them.

        Args:
            parts: the codes.
            first: the position id of the first token of each batch row, if those of the others follow one by one; else `None`.
            keys: whether they are keys, which are multiplied with queries, and not values.
        """
        return None

    def dot(self, query_BGND: Tensor, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """``[B, G, N, S]``: products of queries and decoded rows."""
        rows_BGSD = self.decode(parts, position_BS)
        return query_BGND.to(rows_BGSD.dtype) @ rows_BGSD.mT

    def mix(self, weight_BGNS: Tensor, parts: Parts, position_BS: Tensor | None) -> Tensor:
        """``[B, G, N, D]``: weighted sums of decoded rows."""
        rows_BGSD = self.decode(parts, position_BS)
        return weight_BGNS.to(rows_BGSD.dtype) @ rows_BGSD


@dataclass
class Codes(BatchState):
    """The codes of one layer's keys or values, in preallocated storage.

    Args:
        parts: storage; see `Parts`. Column c of a batch row is its c-th coded token, without its padding.
        room: the number of tokens for which storage is allocated.
        used: the number of coded tokens of the longest batch row.
    """

    parts: Parts = field(default_factory=dict)
    room: int = 0
    used: int = 0

    def write(self, codec: Codec, new: Parts, row: slice, start: int, tokens: int, rows: int) -> None:
        """Stores the codes of new tokens.

        Args:
            codec: the codec that computed the codes.
            new: codes of ``tokens`` tokens for the batch rows of the slice.
            row: the slice of batch rows.
            start: the index of the first new token among the coded tokens.
            tokens: the number of new tokens.
            rows: the number of batch rows.
        """
        self._reserve(codec, new, start + tokens, rows)
        self.used = max(self.used, start + tokens)
        for name, entries in new.items():
            size = codec.entry(name)
            self.parts[name][row, :, start // size : (start + tokens) // size] = entries

    def _reserve(self, codec: Codec, like: Parts, tokens: int, rows: int) -> None:
        if tokens <= self.room:
            return
        room = tokens if not self.room else tokens + max(16, tokens // 8)
        self.room = -(-room // codec.unit) * codec.unit
        for name, entries in like.items():
            size = codec.entry(name)
            shape = (rows, entries.shape[1], self.room // size, *entries.shape[3:])
            grown = entries.new_zeros(shape)  # zeros, because some batch rows may be shorter
            if name in self.parts:
                grown[:, :, : self.used // size] = self.parts[name][:, :, : self.used // size]
            self.parts[name] = grown

    def view(self, codec: Codec) -> Parts:
        """The codes in use."""
        return {name: part[:, :, : -(-self.used // codec.entry(name))] for name, part in self.parts.items()}

    def truncate(self, used: int) -> None:
        """Removes the codes after the first `used` tokens."""
        self.used = min(self.used, used)

    def live_bytes(self, codec: Codec) -> int:
        """Bytes of the codes in use, without unused storage."""
        return sum(part.numel() * part.element_size() for part in self.view(codec).values())

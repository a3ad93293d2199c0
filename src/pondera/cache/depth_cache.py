"""A KV cache that stores KV slots separately by depth; sequences may have different numbers of slots.

A **KV slot** is the keys and values of one token in one layer at one depth (pass). The same tokens have a slot at a depth
in all layers, so the cache stores once, and not per layer, which tokens these are.

Shapes: B batch, T new tokens, S rows of a call in one sequence, N packed rows, C columns of a depth, K columns of all
depths read, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pondera.cache.columns import FREE, DepthSlots
from pondera.cache.masks import SlotMask, token_positions
from pondera.cache.packing import PackedRows
from pondera.cache.state import CacheLayer
from pondera.cache.token_cache import TokenCache
from pondera.core.hf import Cache


@dataclass
class DepthWrite:
    """Where one call writes its keys and values, and the depths that it reads.

    Args:
        depth: the depth that the call writes.
        reads: the depths whose slots attention reads, in this order.
        rows: packed rows; default: `None`, one row for each new token.
        column_N: the column of each packed row; default: `None`, every sequence has the same number of rows, and they
            follow the existing columns.
        width: the number of columns of the depth after the call.
        kept_BT: the tokens whose new keys and values are stored; the others repeat their slot of the depth below.
            Default: `None`, all tokens.
    """

    depth: int
    reads: range
    rows: PackedRows | None = None
    column_N: Tensor | None = None
    width: int = 0
    kept_BT: Tensor | None = None


class DepthLayer(CacheLayer):
    """The KV slots of one decoder layer, by depth; `DepthCache.writing` sets how a call writes and reads them."""

    holds: ClassVar[tuple[str, ...]] = ("parts",)

    def __init__(self, depths: int) -> None:
        self.depths = depths
        super().__init__()

    def clear(self) -> None:
        """See `CacheState.clear`."""
        self.parts: list[tuple[Tensor, Tensor] | None] = [None] * self.depths
        self.write = DepthWrite(0, range(1))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values; returns those of the depths that the call reads, ``[B, H, K, d]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write = self.write
        old, below = self.parts[write.depth], self.parts[write.depth - 1]
        self.parts[write.depth] = (
            _entered(write, old and old[0], below and below[0], key_states),
            _entered(write, old and old[1], below and below[1], value_states),
        )
        stored = [part for part in self.parts[write.reads.start : write.reads.stop] if part is not None]
        if len(stored) == 1:
            return stored[0]
        keys, values = zip(*stored, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def repeat_below(self, depth: int, tokens: int) -> None:
        """Copies the slots of the newest tokens from the depth below to this depth."""
        old, below = self.parts[depth], self.parts[depth - 1]
        assert below is not None
        newest = [state[:, :, -tokens:] for state in below]
        joined = newest if old is None else [torch.cat(pair, dim=-2) for pair in zip(old, newest, strict=True)]
        self.parts[depth] = cast("tuple[Tensor, Tensor]", tuple(joined))

    def get_seq_length(self) -> int:
        """The number of stored slots that the call reads."""
        parts = self.parts[self.write.reads.start : self.write.reads.stop]
        return sum(part[0].shape[-2] for part in parts if part is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the call's mask."""
        return self.get_seq_length() + query_length, 0

    def trim(self, widths: list[int]) -> None:
        """Keeps the first columns of each depth; `widths` has the number for each depth."""
        for depth, (part, width) in enumerate(zip(self.parts, widths, strict=True)):
            if part is not None:
                self.parts[depth] = (part[0][:, :, :width], part[1][:, :, :width])


def _entered(write: DepthWrite, old: Tensor | None, below: Tensor | None, new: Tensor) -> Tensor:
    """The keys or values of a depth, ``[B, H, C, d]``, after a call."""
    if write.rows is None:
        if write.kept_BT is not None and below is not None:
            new = torch.where(write.kept_BT[:, None, :, None], new, below[:, :, -new.shape[-2] :])
        return torch.cat([new] if old is None else [old, new], dim=-2)
    rows = write.rows
    before = 0 if old is None else old.shape[-2]
    if write.column_N is None:
        entering = rows.pad_heads(new)
    elif write.kept_BT is not None:
        assert below is not None
        entering = below[:, :, -write.kept_BT.shape[-1] :]
    else:
        entering = new.new_zeros(rows.batch, new.shape[1], write.width - before, new.shape[-1])
    # Concatenation copies, so the tensors of earlier calls do not change, and no larger storage stays alive.
    buffer = torch.cat([entering] if old is None else [old, entering], dim=-2)
    if write.column_N is not None:
        buffer[rows.batch_N, :, write.column_N] = new[0].transpose(0, 1)
    return buffer


class DepthCache(TokenCache):
    """A cache that counts tokens for `generate` and gives KV slots by depth to the backbone.

    Args:
        num_layers: the number of decoder layers.
        depths: the largest number of slots per token.

    Attributes:
        depths: the columns of each depth; `None` for a depth without slots.
    """

    holds: ClassVar[tuple[str, ...]] = (*TokenCache.holds, "depths")

    def __init__(self, num_layers: int, depths: int) -> None:
        super().__init__([DepthLayer(depths) for _ in range(num_layers)], depths)

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.depths: list[DepthSlots | None] = [None] * self.slots_per_token

    @property
    def _layers(self) -> list[DepthLayer]:
        return cast("list[DepthLayer]", self.layers)

    @contextmanager
    def writing(self, write: DepthWrite) -> Iterator[Cache]:
        """Yields `slots`; calls inside the context write and read as `write` describes."""
        for layer in self._layers:
            layer.write = write
        try:
            yield self.slots
        finally:
            for layer in self._layers:
                layer.write = DepthWrite(0, range(1))

    def width(self, depth: int) -> int:
        """The number of columns of a depth."""
        slots = self.depths[depth]
        return 0 if slots is None else slots.token_BC.shape[1]

    def is_aligned(self, depth: int) -> bool:
        """Whether the slots of all sequences end at the same column."""
        slots = self.depths[depth]
        return slots is None or len(slots.next_B) == 1 or bool((slots.next_B == self.width(depth)).all())

    def append_metadata(self, depth: int, token_BC: Tensor, log_weight_BC: Tensor | None = None) -> None:
        """Adds the metadata of new columns of a depth; callers pass log-weights always or never."""
        old, new = self.depths[depth], DepthSlots(token_BC, log_weight_BC)
        self.depths[depth] = new if old is None else old.joined(new)

    def allocate(
        self, depth: int, rows: PackedRows, token_N: Tensor, log_weight_N: Tensor | None = None
    ) -> Tensor | None:
        """Allocates columns of a depth for packed rows, after the slots of each sequence; returns `DepthWrite.column_N`."""
        old, before = self.depths[depth], self.width(depth)
        if rows.even and self.is_aligned(depth):
            weight_BC = None if log_weight_N is None else rows.pad(log_weight_N[None])
            self.append_metadata(depth, rows.pad(token_N[None]), weight_BC)
            return None
        next_B = token_N.new_zeros(rows.batch) if old is None else old.next_B
        column_N = next_B[rows.batch_N] + rows.order_N
        more = max(0, int(column_N.max()) + 1 - before)
        weight_BC = None if log_weight_N is None else log_weight_N.new_zeros(rows.batch, more)
        self.append_metadata(depth, token_N.new_full((rows.batch, more), FREE), weight_BC)
        slots = self.depths[depth]
        assert slots is not None
        token_BC = slots.token_BC.index_put((rows.batch_N, column_N), token_N)
        if slots.log_weight_BC is not None and log_weight_N is not None:
            weight_BC = slots.log_weight_BC.index_put((rows.batch_N, column_N), log_weight_N)
        self.depths[depth] = DepthSlots(token_BC, weight_BC)
        return column_N

    def repeat_below(self, depth: int, tokens: int) -> None:
        """Copies the slots of the newest tokens from the depth below to this depth."""
        for layer in self._layers:
            layer.repeat_below(depth, tokens)

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`."""
        self.depths = [depth and depth.before(tokens) for depth in self.depths]
        for layer in self._layers:
            layer.trim([0 if depth is None else depth.token_BC.shape[1] for depth in self.depths])


def slot_mask(
    seen_BSK: Tensor,
    query_BS: Tensor,
    key_BK: Tensor,
    mask_BT: Tensor | None,
    tokens: int,
    by_position: bool,
    log_weight_BK: Tensor | None = None,
) -> SlotMask:
    """The mask of a call over columns: the method's mask, limited to columns that are not free and to the same document.

    Args:
        seen_BSK: the mask of the method, which ignores documents and free columns.
        query_BS: token index of each row; `FREE` for a row that only pads its sequence.
        key_BK: token index of each column, or `FREE`.
        mask_BT: token mask, as for `Think.forward`, or `None`.
        tokens: T, the number of cached and new tokens.
        by_position: whether the decoder has sliding windows, which count positions.
        log_weight_BK: added to the attention scores of each column; default: `None`, nothing is added.
    """
    allowed_BSK = seen_BSK & (key_BK >= 0)[:, None]
    if mask_BT is not None:
        allowed_BSK = allowed_BSK & (_at(mask_BT, key_BK)[:, None] == _at(mask_BT, query_BS)[..., None])
    # A row that only pads may see any column: a softmax over no column would be NaN.
    allowed_BSK = allowed_BSK | (query_BS < 0)[..., None]
    if not by_position:
        return SlotMask(allowed_BSK, query_BS, key_BK, log_weight_BK)
    position_BT = token_positions(tokens, mask_BT, 0, key_BK.device).expand(len(key_BK), -1)
    return SlotMask(allowed_BSK, _at(position_BT, query_BS), _at(position_BT, key_BK), log_weight_BK)


def _at(value_BT: Tensor, index_BS: Tensor) -> Tensor:
    return value_BT.gather(1, index_BS.clamp(min=0))

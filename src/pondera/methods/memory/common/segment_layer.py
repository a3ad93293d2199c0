"""Cache of one decoder layer for segment-level recurrence: the open block, and the state of closed blocks.

Sequences of a batch may be at different positions of different blocks. Their data in one layer is one tensor: an open
block is left-aligned (free columns after it), and memory and local context are right-aligned (free columns before
them).

Shapes: B sequences, A active sequences of a call, S tokens of a call, L block, W columns, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.attention import Attention
from pondera.cache.state import CacheLayer
from pondera.models.rotary import Rotary

RecurrentState = dict[str, Tensor]
"""The state of a layer by name, ``[B, H, W, d]`` each: ``block_k``, ``block_v``, ``carry_k``, ``carry_v``, ``rows_k``,
``rows_v`` (the inputs of attention), and the tensors from which a method computes its memory slots."""

Remember = Callable[[RecurrentState, Tensor, Tensor, list[int]], RecurrentState]
"""Computes a layer's memory after a block, from its state, the block's keys without positions and its values,
``[A, H, L, d]``, and the number of earlier closed blocks of each sequence."""


@dataclass(frozen=True)
class SegmentStep:
    """The tokens that a call adds to the open blocks.

    Args:
        fill_A: tokens already in the open block, for each active sequence.
        count_A: tokens to add.
        width: columns afterwards.
        active_A: batch indices of the active sequences; ``None``: all sequences, with equal `fill_A`, `count_A` and
            number of closed blocks.
        batch: B.
    """

    fill_A: list[int]
    count_A: list[int]
    width: int
    batch: int
    active_A: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the tokens in their blocks, ``[1 or A, S]``; undefined after a sequence's last new token."""
        if self.active_A is None:
            return torch.arange(self.fill_A[0], self.width, device=device)[None]
        order_S = torch.arange(max(self.count_A), device=device)
        return (torch.tensor(self.fill_A, device=device)[:, None] + order_S).clamp(max=self.width - 1)

    def valid(self, device: torch.device) -> Tensor:
        """``[A, S]``: true for tokens, false for padding of the call."""
        order_S = torch.arange(max(self.count_A), device=device)
        return order_S < torch.tensor(self.count_A, device=device)[:, None]

    def entered(self, old: Tensor | None, new_AHSd: Tensor) -> Tensor:
        """The open blocks with the tokens of the call appended, ``[B, H, W, d]``."""
        if self.active_A is None:
            return new_AHSd if old is None else torch.cat([old, new_AHSd], dim=-2)
        _, heads, _, width = new_AHSd.shape
        if old is None:
            old = new_AHSd.new_zeros(self.batch, heads, 0, width)
        buffer_BWHd = F.pad(old, (0, 0, 0, self.width - old.shape[-2])).transpose(1, 2)
        valid_AS, position_AS = self.valid(old.device), self.positions(old.device)
        sequence_AS = self.active_A[:, None].expand_as(valid_AS)
        at = (sequence_AS[valid_AS], position_AS[valid_AS])
        return buffer_BWHd.index_put(at, new_AHSd.transpose(1, 2)[valid_AS]).transpose(1, 2)

    def of(self, x_BHWd: Tensor) -> Tensor:
        """Selects the active sequences."""
        return x_BHWd if self.active_A is None else x_BHWd[self.active_A]


@dataclass(frozen=True)
class SegmentEnd:
    """The sequences whose block closes.

    Args:
        sequences: batch indices of the sequences; ``None``: all.
        batch: B.
        blocks: number of earlier closed blocks of each of these sequences.
        cut: whether gradients are cut at this boundary, for each of these sequences.
        keeps: keep the previous state for rollback.
        own: rotary embedding of the keys of the block; ``None``: none.
        carried: returns the rotary embedding of a local context of the given width, before and after the boundary.
    """

    sequences: Tensor | None
    batch: int
    blocks: list[int]
    cut: list[bool]
    keeps: bool
    own: Rotary | None
    carried: Callable[[int], Rotary | None]

    def of(self, state: RecurrentState) -> RecurrentState:
        """Selects the state of these sequences."""
        return dict(state) if self.sequences is None else {name: x[self.sequences] for name, x in state.items()}

    def put(self, state: RecurrentState, new: RecurrentState) -> RecurrentState:
        """The state of all sequences, with new tensors for these."""
        if self.sequences is None:
            return new
        return state | {name: _put(state.get(name), x, self.sequences, self.batch, name) for name, x in new.items()}

    def without_gradient(self, new: RecurrentState) -> RecurrentState:
        """Detaches tensors where gradients are cut."""
        if not any(self.cut):
            return new
        if all(self.cut):
            return {name: x.detach() for name, x in new.items()}
        cut_A111 = torch.tensor(self.cut)[:, None, None, None]
        return {name: torch.where(cut_A111.to(x.device), x.detach(), x) for name, x in new.items()}


def _put(old: Tensor | None, new: Tensor, sequences: Tensor, batch: int, name: str) -> Tensor:
    """Replaces some sequences of `old`; blocks are left-aligned, all other tensors right-aligned."""
    if old is None:
        old = new.new_zeros(batch, *new.shape[1:])
    width = max(old.shape[-2], new.shape[-2])

    def padded(x: Tensor) -> Tensor:
        free = width - x.shape[-2]
        return F.pad(x, (0, 0, 0, free) if name.startswith("block") else (0, 0, free, 0))

    return padded(old).index_copy(0, sequences, padded(new))


def newest(state: RecurrentState, key_AHWd: Tensor, value_AHWd: Tensor, most: int) -> RecurrentState:
    """Appends new memory slots and keeps the last `most`."""
    new: RecurrentState = {}
    for name, x_AHWd in (("rows_k", key_AHWd), ("rows_v", value_AHWd)):
        old = [state[name]] if name in state else []
        new[name] = torch.cat([*old, x_AHWd], dim=-2)[:, :, -most:].clone()
    return new


class SegmentLayer(CacheLayer):
    """The open blocks of one decoder layer and the state of its closed blocks.

    Args:
        update_memory: computes the layer's memory; ``None``: no memory.
        mems: number of last tokens before a block whose keys and values are kept exactly.
    """

    holds: ClassVar[tuple[str, ...]] = ("held", "before")

    def __init__(self, update_memory: Remember | None, mems: int) -> None:
        super().__init__()
        self.update_memory, self.mems = update_memory, mems

    def clear(self) -> None:
        """See `CacheState.clear`."""
        self.held: RecurrentState = {}
        self.before: RecurrentState = {}
        self.turn: SegmentStep | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends new keys and values; returns those of memory, local context and open blocks, ``[A, H, K, d]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.turn is not None
        self.held["block_k"] = self.turn.entered(self.held.get("block_k"), key_states)
        self.held["block_v"] = self.turn.entered(self.held.get("block_v"), value_states)
        return self._read("k"), self._read("v")

    def _read(self, which: str) -> Tensor:
        assert self.turn is not None
        parts = [self.held[f"{name}_{which}"] for name in ("rows", "carry", "block") if f"{name}_{which}" in self.held]
        return self.turn.of(torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0])

    def widths(self) -> tuple[int, int]:
        """Numbers of columns of memory and of local context."""
        memory, mems = (self.held.get(name) for name in ("rows_k", "carry_k"))
        return 0 if memory is None else memory.shape[-2], 0 if mems is None else mems.shape[-2]

    def close(self, closing: SegmentEnd) -> None:
        """Closes the open block of these sequences."""
        old = closing.of(self.held)
        key, value = old["block_k"], old["block_v"]
        if closing.own is not None:
            key = closing.own.undo(key)
        new: RecurrentState = {}
        if self.update_memory is not None:
            new |= self.update_memory(old, key, value, closing.blocks)
        if self.mems:
            new |= self._carried(old, key, value, closing)
        if closing.keeps:
            self.before = closing.put(self.before, old)
        others = self.held if closing.sequences is not None else {}
        self.held = closing.put(others, closing.without_gradient(new))

    def _carried(
        self, old: RecurrentState, key_AHLd: Tensor, value_AHLd: Tensor, closing: SegmentEnd
    ) -> RecurrentState:
        """The local context of the next block; position 0 is now the first token of that block."""
        if "carry_k" in old:
            earlier, turned = old["carry_k"], closing.carried(old["carry_k"].shape[-2])
            key_AHLd = torch.cat([earlier if turned is None else turned.undo(earlier), key_AHLd], dim=-2)
            value_AHLd = torch.cat([old["carry_v"], value_AHLd], dim=-2)
        key, value = key_AHLd[:, :, -self.mems :], value_AHLd[:, :, -self.mems :]
        turned = closing.carried(key.shape[-2])
        return {"carry_k": key.clone() if turned is None else turned.apply(key), "carry_v": value.clone()}

    def reopen(self, sequences: Tensor | None, batch: int) -> None:
        """Rolls back the last block boundary of these sequences."""
        if sequences is None:
            self.held = dict(self.before)
        else:
            for name, x in self.before.items():
                self.held[name] = _put(self.held.get(name), x[sequences], sequences, batch, name)

    def trim(self, width: int) -> None:
        """Keeps the first `width` columns of the open blocks."""
        for name in ("block_k", "block_v"):
            if name in self.held:
                self.held[name] = self.held[name][:, :, :width]

    def get_seq_length(self) -> int:
        """Number of columns of the open blocks."""
        return self.held["block_k"].shape[-2] if "block_k" in self.held else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the call's mask."""
        return sum(self.widths()) + self.get_seq_length() + query_length, 0


def fewer_rows(
    base: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Base attention for layers without memory slots: crops the mask to the last columns."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., -key.shape[-2] :]
    return base(module, query, key, value, attention_mask, **kwargs)

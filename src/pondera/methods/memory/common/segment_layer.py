"""One decoder layer of a model that reads block by block: the rows of the open block, and what is held of closed ones.

Texts of a batch may stand at different places of different blocks. What all of them own in one layer is one tensor; a
text's open block begins at its first column, and what is held of its past ends at its last, behind columns that are free.

Shapes: B texts, A texts that take part in a call, S rows of a call, L block, W columns, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from torch.nn import functional as F

from pondera.cache.attention import Attention
from pondera.core.hf import CacheLayerMixin
from pondera.models.rotary import Rotary

RecurrentState = dict[str, Tensor]
"""What a layer holds, by name, ``[B, H, W, d]`` each: ``block_k``, ``block_v``, ``carry_k``, ``carry_v``, ``rows_k``,
``rows_v`` (what attention is given), and whatever a method keeps to make its rows of."""

Remember = Callable[[RecurrentState, Tensor, Tensor, list[int]], RecurrentState]
"""A layer's memory after a block: of what it held, the block's keys without positions and its values, ``[A, H, L, d]``,
and the number of blocks that each text had closed before."""


@dataclass(frozen=True)
class SegmentStep:
    """Which rows a call adds to the open blocks of which texts.

    Args:
        fill_A: rows that are there, of each text that takes part.
        count_A: rows that are added.
        width: columns afterwards.
        texts_A: the texts that take part; none: all of them have as many rows and get as many, behind as many closed blocks.
        batch: B.
    """

    fill_A: list[int]
    count_A: list[int]
    width: int
    batch: int
    texts_A: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Of the rows in their blocks, ``[1 or A, S]``; what stands behind a text's own rows means nothing."""
        if self.texts_A is None:
            return torch.arange(self.fill_A[0], self.width, device=device)[None]
        order_S = torch.arange(max(self.count_A), device=device)
        return (torch.tensor(self.fill_A, device=device)[:, None] + order_S).clamp(max=self.width - 1)

    def valid(self, device: torch.device) -> Tensor:
        """``[A, S]``: the rows that there are."""
        order_S = torch.arange(max(self.count_A), device=device)
        return order_S < torch.tensor(self.count_A, device=device)[:, None]

    def entered(self, old: Tensor | None, new_AHSd: Tensor) -> Tensor:
        """The open blocks with the call's rows, ``[B, H, W, d]``."""
        if self.texts_A is None:
            return new_AHSd if old is None else torch.cat([old, new_AHSd], dim=-2)
        _, heads, _, width = new_AHSd.shape
        if old is None:
            old = new_AHSd.new_zeros(self.batch, heads, 0, width)
        buffer_BWHd = F.pad(old, (0, 0, 0, self.width - old.shape[-2])).transpose(1, 2)
        valid_AS, position_AS = self.valid(old.device), self.positions(old.device)
        text_AS = self.texts_A[:, None].expand_as(valid_AS)
        at = (text_AS[valid_AS], position_AS[valid_AS])
        return buffer_BWHd.index_put(at, new_AHSd.transpose(1, 2)[valid_AS]).transpose(1, 2)

    def of(self, x_BHWd: Tensor) -> Tensor:
        """What the texts that take part own."""
        return x_BHWd if self.texts_A is None else x_BHWd[self.texts_A]


@dataclass(frozen=True)
class SegmentEnd:
    """Which texts' blocks close.

    Args:
        texts: the texts; none: all of them.
        batch: B.
        blocks: how many blocks each of these texts has closed before.
        cut: of which of them gradients do not pass this border.
        keeps: whether what was held before can be needed again.
        own: what keys of the block are turned by; none: nothing.
        carried: what rows carried over are turned by, before and after.
    """

    texts: Tensor | None
    batch: int
    blocks: list[int]
    cut: list[bool]
    keeps: bool
    own: Rotary | None
    carried: Callable[[int], Rotary | None]

    def of(self, held: RecurrentState) -> RecurrentState:
        """What these texts own."""
        return dict(held) if self.texts is None else {name: x[self.texts] for name, x in held.items()}

    def put(self, held: RecurrentState, new: RecurrentState) -> RecurrentState:
        """What all texts hold, when these hold something new."""
        if self.texts is None:
            return new
        return held | {name: _put(held.get(name), x, self.texts, self.batch, name) for name, x in new.items()}

    def without_gradient(self, new: RecurrentState) -> RecurrentState:
        """Cuts gradients where they are to be cut."""
        if not any(self.cut):
            return new
        if all(self.cut):
            return {name: x.detach() for name, x in new.items()}
        cut_A111 = torch.tensor(self.cut)[:, None, None, None]
        return {name: torch.where(cut_A111.to(x.device), x.detach(), x) for name, x in new.items()}


def _put(old: Tensor | None, new: Tensor, texts: Tensor, batch: int, name: str) -> Tensor:
    """`old` with the rows of some texts replaced; a block's columns count from the first, all others from the last."""
    if old is None:
        old = new.new_zeros(batch, *new.shape[1:])
    width = max(old.shape[-2], new.shape[-2])

    def padded(x: Tensor) -> Tensor:
        free = width - x.shape[-2]
        return F.pad(x, (0, 0, 0, free) if name.startswith("block") else (0, 0, free, 0))

    return padded(old).index_copy(0, texts, padded(new))


def newest(held: RecurrentState, key_AHWd: Tensor, value_AHWd: Tensor, most: int) -> RecurrentState:
    """Memory rows with further ones behind them, the last `most` of them all."""
    new: RecurrentState = {}
    for name, x_AHWd in (("rows_k", key_AHWd), ("rows_v", value_AHWd)):
        old = [held[name]] if name in held else []
        new[name] = torch.cat([*old, x_AHWd], dim=-2)[:, :, -most:].clone()
    return new


class SegmentLayer(CacheLayerMixin):
    """One decoder layer's open blocks and what it holds of closed ones.

    Args:
        update_memory: the layer's memory; none: it has none.
        mems: rows that are carried over as they are.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, update_memory: Remember | None, mems: int) -> None:
        super().__init__()
        self.update_memory, self.mems = update_memory, mems
        self.held: RecurrentState = {}
        self.before: RecurrentState = {}
        self.turn: SegmentStep | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds the call's rows; returns keys and values of memory, carried rows and open blocks, ``[A, H, K, d]``."""
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
        """Columns of memory and of carried rows."""
        memory, mems = (self.held.get(name) for name in ("rows_k", "carry_k"))
        return 0 if memory is None else memory.shape[-2], 0 if mems is None else mems.shape[-2]

    def close(self, closing: SegmentEnd) -> None:
        """Puts a block behind each of these texts."""
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
        others = self.held if closing.texts is not None else {}
        self.held = closing.put(others, closing.without_gradient(new))

    def _carried(
        self, old: RecurrentState, key_AHLd: Tensor, value_AHLd: Tensor, closing: SegmentEnd
    ) -> RecurrentState:
        """The last rows before the next block, whose first token stands at 0 again."""
        if "carry_k" in old:
            earlier, turned = old["carry_k"], closing.carried(old["carry_k"].shape[-2])
            key_AHLd = torch.cat([earlier if turned is None else turned.undo(earlier), key_AHLd], dim=-2)
            value_AHLd = torch.cat([old["carry_v"], value_AHLd], dim=-2)
        key, value = key_AHLd[:, :, -self.mems :], value_AHLd[:, :, -self.mems :]
        turned = closing.carried(key.shape[-2])
        return {"carry_k": key.clone() if turned is None else turned.apply(key), "carry_v": value.clone()}

    def reopen(self, texts: Tensor | None, batch: int) -> None:
        """Takes the last border of these texts back."""
        if texts is None:
            self.held = dict(self.before)
        else:
            for name, x in self.before.items():
                self.held[name] = _put(self.held.get(name), x[texts], texts, batch, name)

    def trim(self, width: int) -> None:
        """Keeps so many columns of the open blocks."""
        for name in ("block_k", "block_v"):
            if name in self.held:
                self.held[name] = self.held[name][:, :, :width]

    def select(self, rows: Tensor) -> None:
        """Keeps these texts of the batch, in this order."""
        self.held, self.before = (
            {name: x[rows.to(x.device)] for name, x in d.items()} for d in (self.held, self.before)
        )

    def get_seq_length(self) -> int:
        """Columns of the open blocks."""
        return self.held["block_k"].shape[-2] if "block_k" in self.held else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the call's mask."""
        return sum(self.widths()) + self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.held, self.before, self.is_initialized = {}, {}, False

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        self.select(beam_idx)


def fewer_rows(
    base: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The backbone's own attention, in layers some of which give no memory: a mask's last columns are theirs."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., -key.shape[-2] :]
    return base(module, query, key, value, attention_mask, **kwargs)

"""The cache of a model that reads block by block: the open block's rows, and what is held of those that have closed.

A block that is full is closed when its text goes on. What follows of it (memory rows, rows carried over) is worked out
then, by the method; the block as it was, with what was held before it, is kept until the next one closes, so that tokens
can be taken back across one border. None of this grows with the text.

Texts of a batch may stand at different places of different blocks. What all of them own in one layer is one tensor; a
text's open block begins at its first column, and what is held of its past ends at its last, behind columns that are free.

Shapes: B texts, A texts that take part in a call, S rows of a call, L block, W columns, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from torch.nn import functional as F

from pondera.ground.errors import UserError
from pondera.model.backbone import Backbone, SlotMask
from pondera.model.cache import TokenCache
from pondera.model.hf import AttentionInterface, CacheLayerMixin
from pondera.model.rotation import Rotation
from pondera.model.rows import attention

Held = dict[str, Tensor]
"""What a layer holds, by name, ``[B, H, W, d]`` each: ``block_k``, ``block_v``, ``carry_k``, ``carry_v``, ``rows_k``,
``rows_v`` (what attention is given), and whatever a method keeps to make its rows of."""

Remember = Callable[[Held, Tensor, Tensor, list[int]], Held]
"""A layer's memory after a block: of what it held, the block's keys without positions and its values, ``[A, H, L, d]``,
and the number of blocks that each text had closed before."""

FEWER_ROWS = "pondera_fewer_rows"


@dataclass(frozen=True)
class Turn:
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
class Closing:
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
    own: Rotation | None
    carried: Callable[[int], Rotation | None]

    def of(self, held: Held) -> Held:
        """What these texts own."""
        return dict(held) if self.texts is None else {name: x[self.texts] for name, x in held.items()}

    def put(self, held: Held, new: Held) -> Held:
        """What all texts hold, when these hold something new."""
        if self.texts is None:
            return new
        return held | {name: _put(held.get(name), x, self.texts, self.batch, name) for name, x in new.items()}

    def without_gradient(self, new: Held) -> Held:
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


def newest(held: Held, key_AHWd: Tensor, value_AHWd: Tensor, most: int) -> Held:
    """Memory rows with further ones behind them, the last `most` of them all."""
    new: Held = {}
    for name, x_AHWd in (("rows_k", key_AHWd), ("rows_v", value_AHWd)):
        old = [held[name]] if name in held else []
        new[name] = torch.cat([*old, x_AHWd], dim=-2)[:, :, -most:].clone()
    return new


class BlockLayer(CacheLayerMixin):
    """One decoder layer's open blocks and what it holds of closed ones.

    Args:
        remember: the layer's memory; none: it has none.
        carry: rows that are carried over as they are.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, remember: Remember | None, carry: int) -> None:
        super().__init__()
        self.remember, self.carry = remember, carry
        self.held: Held = {}
        self.before: Held = {}
        self.turn: Turn | None = None

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
        memory, carry = (self.held.get(name) for name in ("rows_k", "carry_k"))
        return 0 if memory is None else memory.shape[-2], 0 if carry is None else carry.shape[-2]

    def close(self, closing: Closing) -> None:
        """Puts a block behind each of these texts."""
        old = closing.of(self.held)
        key, value = old["block_k"], old["block_v"]
        if closing.own is not None:
            key = closing.own.undo(key)
        new: Held = {}
        if self.remember is not None:
            new |= self.remember(old, key, value, closing.blocks)
        if self.carry:
            new |= self._carried(old, key, value, closing)
        if closing.keeps:
            self.before = closing.put(self.before, old)
        others = self.held if closing.texts is not None else {}
        self.held = closing.put(others, closing.without_gradient(new))

    def _carried(self, old: Held, key_AHLd: Tensor, value_AHLd: Tensor, closing: Closing) -> Held:
        """The last rows before the next block, whose first token stands at 0 again."""
        if "carry_k" in old:
            earlier, turned = old["carry_k"], closing.carried(old["carry_k"].shape[-2])
            key_AHLd = torch.cat([earlier if turned is None else turned.undo(earlier), key_AHLd], dim=-2)
            value_AHLd = torch.cat([old["carry_v"], value_AHLd], dim=-2)
        key, value = key_AHLd[:, :, -self.carry :], value_AHLd[:, :, -self.carry :]
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


class BlockCache(TokenCache):
    """Tokens to `generate`; to the backbone, at most a block of rows and what is held of the blocks before.

    Args:
        block: L.
        kinds: of each layer, as `Backbone.layer_types`.
        layers: one cache layer per decoder layer.
        rows: how many memory rows a text has that has closed so many blocks.
        tbptt: gradients do not pass every so many-th border; none: they pass all.
        keeps: whether tokens may be taken back across a border.

    Attributes:
        fill: rows of each text's open block.
        closed: blocks that each text has closed.
    """

    def __init__(
        self,
        block: int,
        kinds: list[str],
        layers: list[BlockLayer],
        rows: Callable[[int], int],
        tbptt: int | None,
        keeps: bool = True,
    ) -> None:
        super().__init__(layers, 1)
        self.block, self.kinds, self.rows, self.tbptt, self.keeps = block, kinds, rows, tbptt, keeps
        self.fill: list[int] = []
        self.closed: list[int] = []
        self._reopens: list[bool] = []
        self._real_BW: Tensor | None = None

    def start(self, batch: int) -> None:
        """Makes room for so many texts, if nothing was read yet."""
        if not self.fill:
            self.fill, self.closed, self._reopens = [0] * batch, [0] * batch, [False] * batch

    def room(self, text: int) -> int:
        """Tokens that the text can read before the next border."""
        return self.block - self.fill[text] % self.block

    @property
    def even(self) -> bool:
        """All texts stand at the same place."""
        return len(set(self.fill)) < 2 and len(set(self.closed)) < 2

    def begin(self, backbone: Backbone, counts: list[int], h_BTD: Tensor) -> Turn:
        """Prepares a call that adds so many rows of each text, none or up to its next border.

        Args:
            backbone: turns keys.
            counts: rows of each text.
            h_BTD: inputs, for their dtype and device.
        """
        active = [text for text, count in enumerate(counts) if count]
        self._close(backbone, [text for text in active if self.fill[text] == self.block], h_BTD)
        fill, count = [self.fill[text] for text in active], [counts[text] for text in active]
        together = len(active) == len(counts) and self.even and len(set(count)) == 1
        for text in active:
            self.fill[text] += counts[text]
        width = max(self.fill)
        texts = None if together else torch.tensor(active, device=h_BTD.device)
        turn = Turn(fill, count, width, len(counts), texts)
        for layer in self._layers:
            layer.trim(fill[0] if together else width)
            layer.turn = turn
        return turn

    def _close(self, backbone: Backbone, texts: list[int], h_BTD: Tensor) -> None:
        if not texts:
            return
        device, blocks = h_BTD.device, [self.closed[text] for text in texts]
        chosen = None if len(texts) == len(self.fill) else torch.tensor(texts, device=device)
        cut = [self.tbptt is not None and (count + 1) % self.tbptt == 0 for count in blocks]
        closings = {}
        for kind in set(self.kinds):

            def turned(first: int, stop: int, kind: str = kind) -> Rotation | None:
                return backbone.rotation(kind, torch.arange(first, stop, device=device)[None], h_BTD)

            own = turned(0, self.block)
            closings[kind] = Closing(
                chosen, len(self.fill), blocks, cut, self.keeps, own, lambda width, turned=turned: turned(-width, 0)
            )
        for layer, kind in zip(self._layers, self.kinds, strict=True):
            layer.close(closings[kind])
        for text in texts:
            self.closed[text] += 1
            self.fill[text], self._reopens[text] = 0, self.keeps

    def masks(self, turn: Turn, device: torch.device) -> dict[str, SlotMask]:
        """What the rows of a call see, for each kind of layer: memory, carried rows, and their block up to themselves."""
        position_AS = turn.positions(device)
        if turn.texts_A is None:
            closed = self.closed[:1]
        else:
            closed = [self.closed[text] for text in turn.texts_A.tolist()]
        found = {}
        for kind in set(self.kinds):
            layers = [layer for layer, its in zip(self._layers, self.kinds, strict=True) if its == kind]
            memory, carry = (max(width) for width in zip(*(layer.widths() for layer in layers), strict=True))
            order_K = torch.arange(-memory - carry, turn.width, device=device)
            own_A1 = torch.tensor([self.rows(count) for count in closed], device=device)[:, None]
            carried_A1 = torch.tensor([min(carry, count * self.block) for count in closed], device=device)[:, None]
            there_AK = torch.where(order_K < -carry, order_K >= -carry - own_A1, order_K >= -carried_A1)
            seen_ASK = (order_K <= position_AS[..., None]) & there_AK[:, None]
            found[kind] = SlotMask(seen_ASK, position_AS, order_K[None])
        return found

    @property
    def _layers(self) -> list[BlockLayer]:
        return self.layers  # type: ignore[return-value]

    @property
    def mixed(self) -> bool:
        """Layers of one kind give different numbers of rows."""
        return any(
            len({layer.remember is None for layer, its in zip(self._layers, self.kinds, strict=True) if its == kind})
            > 1
            for kind in set(self.kinds)
        )

    def note(self, passes_BT: Tensor, real_BT: Tensor | None) -> None:
        """Notes that these tokens were read, and which of them were padding."""
        batch, tokens = passes_BT.shape
        if real_BT is not None or self._real_BW is not None:
            new = torch.ones_like(passes_BT, dtype=torch.bool) if real_BT is None else real_BT
            old = self._real_BW if self._real_BW is not None else new.new_ones(batch, min(self.tokens, 2 * self.block))
            self._real_BW = torch.cat([old, new], dim=1)[:, -2 * self.block :]
        self.tokens += tokens
        self.passes_BT = passes_BT.new_ones(()).expand(batch, self.tokens)  # one number, however long the text

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does), back to the border before the last.

        Raises:
            UserError: more of them than are kept.
        """
        count = abs(tokens_to_remove)
        if not count:
            return
        counts = [count] * len(self.fill)
        if self._real_BW is not None and count <= self._real_BW.shape[1]:
            counts = self._real_BW[:, -count:].sum(-1).tolist()
        kept = [have + self.block * reopens for have, reopens in zip(self.fill, self._reopens, strict=True)]
        if any(more > most for more, most in zip(counts, kept, strict=True)):
            raise UserError(
                f"crop: {count} tokens are to be forgotten, of which the rows are kept for {min(kept)}: those of the open "
                f"block and of the one before (block={self.block}); start with a new cache"
            )
        back = [text for text, more in enumerate(counts) if more > self.fill[text]]
        if back:
            device = next(iter(self._layers[0].before.values())).device
            chosen = None if len(back) == len(counts) else torch.tensor(back, device=device)
            for layer in self._layers:
                layer.reopen(chosen, len(counts))
            for text in back:
                self.fill[text] += self.block
                self.closed[text] -= 1
                self._reopens[text] = False
        self.fill = [have - more for have, more in zip(self.fill, counts, strict=True)]
        for layer in self._layers:
            layer.trim(max(self.fill))
        if self._real_BW is not None:
            self._real_BW = self._real_BW[:, :-count]
        self.forget(count)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.fill, self.closed, self._reopens, self._real_BW = [], [], [], None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        for layer in self._layers:
            layer.select(indices)
        self._rows(indices)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        self.batch_select_indices(torch.arange(len(self.fill)).repeat_interleave(repeats))

    def _rows(self, indices: Tensor) -> None:
        super()._rows(indices)
        order = indices.tolist()
        self.fill, self.closed, self._reopens = (
            [each[text] for text in order] for each in (self.fill, self.closed, self._reopens)
        )
        if self._real_BW is not None:
            self._real_BW = self._real_BW[indices.to(self._real_BW.device)]

    def state_dict(self) -> dict[str, Any]:
        """All that was read, as plain values and tensors, to be saved and read on from later."""
        return {
            "tokens": self.tokens,
            "passes": self.passes_BT,
            "texts": {"fill": self.fill, "closed": self.closed, "reopens": self._reopens, "real": self._real_BW},
            "layers": [{"held": dict(layer.held), "before": dict(layer.before)} for layer in self._layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, of a model with the same method and backbone."""
        self.tokens, self.passes_BT = state["tokens"], state["passes"]
        texts = state["texts"]
        self.fill, self.closed, self._reopens = (list(texts[name]) for name in ("fill", "closed", "reopens"))
        self._real_BW = texts["real"]
        for layer, own in zip(self._layers, state["layers"], strict=True):
            layer.held, layer.before = dict(own["held"]), dict(own["before"])
            if "block_k" in layer.held:
                layer.lazy_initialization(layer.held["block_k"], layer.held["block_v"])


def fewer_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, inner: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The backbone's own attention, in layers some of which give no memory: a mask's last columns are theirs."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., -key.shape[-2] :]
    return attention(module, inner)(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(FEWER_ROWS, fewer_rows)

"""Reading block by block: what every memory made of closed blocks shares, whatever its rows are.

A text is cut into blocks of L tokens, counted from its first. A block is one call of the decoder: its tokens see each
other, causally, and beside them the memory rows of the blocks before, all in one softmax. So the layers never see more
than memory and a block, and time and memory per token stay what they are however long the text becomes.

Shapes: B batch, T tokens, N tokens of all texts that are no padding, A texts that take part in a call, S rows of a call,
L block, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pondera.cache.attention import Server
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError
from pondera.cost.model import DecoderPass, MatMul
from pondera.methods.memory.common.segment_cache import SegmentCache
from pondera.methods.memory.common.segment_layer import RecurrentState, SegmentLayer, fewer_rows
from pondera.models.backbone import LAYOUTS, Backbone
from pondera.models.method import Method, MethodOutput, SlotMaker


@dataclass(frozen=True)
class Shape:
    """What a price needs to know of a backbone.

    Args:
        kv_numbers: of one row's key, and as many of its value: heads times their width.
        query_numbers: of one row's query.
        memory: layers that have memory.
        full: layers without windows.
        layers: all of them.
        window: tokens that a sliding-window layer sees.
    """

    kv_numbers: int
    query_numbers: int
    memory: int
    full: int
    layers: int
    window: int


class SegmentRecurrence(Method):
    """Reads block by block, with rows of memory beside each block.

    A subclass says what the rows are: `rows` how many, `update_memory` which.

    Positions are counted from the block's first token, for rotary and learned ones alike. Layers with sliding windows keep
    their windows as they are, across borders: the rows that they still see are carried over and turned to their places
    before the block. They have no other memory, as they are bounded already.

    Args:
        block: L, tokens.
        local_context: rows of the last tokens before a block, carried over as they are into layers that have memory (and
            those of the same kind), at the positions before the block's first.
        tbptt: gradients reach back through at most so many blocks: they are cut at every so many-th border; none: never.
        layers: numbers of the layers that have memory; none: all without a sliding window.
    """

    supports_recompute: ClassVar[bool] = False
    drops_window_rows: ClassVar[bool] = False
    unbounded_positions: ClassVar[bool] = True

    def __init__(
        self, block: int = 128, local_context: int = 0, tbptt: int | None = 2, layers: list[int] | None = None
    ) -> None:
        super().__init__()
        for name, value, least in (("block", block, 1), ("local_context", local_context, 0), ("tbptt", tbptt, 1)):
            if value is not None and value < least:
                raise UserError(f"{name}={value}: give {least} or more")
        self.block, self.local_context, self.tbptt, self.layers = block, local_context, tbptt, layers
        self.shape: Shape | None = None

    @abstractmethod
    def rows(self, blocks: int) -> int:
        """Memory rows beside a block, when so many were closed before it."""

    @abstractmethod
    def update_memory(
        self, held: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """A layer's memory once a block is closed.

        Args:
            held: what it was before, as this function gave it; nothing of it where no block was closed. Of a text that had
                closed none while others had, what is there means nothing.
            key_BHLd, value_BHLd: the block's keys, without positions, and values.
            blocks: that each text had closed before.

        Returns:
            ``rows_k`` and ``rows_v``, ``[B, H, W, d]``, what attention is given: the last `rows` of each text; and
            whatever else this function needs to find again, ``[B, H, any, d]`` each.
        """

    def numbers(self, blocks: int) -> int:
        """Float32 numbers that are kept beside the memory rows, for each coordinate of keys and as many for values."""
        return 0

    def products(self, blocks: int, gradient: bool = False) -> list[MatMul]:
        """What `update_memory` multiplies in one layer of one text that had closed so many blocks; with `gradient` also what its
        backward pass does."""
        return []

    def attended(self, blocks: int) -> int:
        """Memory rows that the backbone's own attention is given in layers with memory."""
        return self.rows(blocks)

    def searches(self, rows: float, blocks: int, gradient: bool = False) -> list[MatMul]:
        """What so many rows of a text multiply in one layer to read memory, beside the backbone's own attention; arguments
        as for `products`."""
        return []

    def attention(self, backbone: Backbone, held: SegmentCache, h_ASD: Tensor, position_AS: Tensor) -> Server | None:
        """What serves the attention of a call in place of the backbone's own, as `Backbone.step` takes it."""
        return fewer_rows if held.mixed else None

    # What the backbone has to be

    def bind(self, backbone: Backbone) -> None:
        """Looks whether the backbone fits."""
        name, config = type(self).__name__, backbone.config
        kinds = backbone.layer_types
        if "linear_attention" in kinds:
            raise UserError(
                f"{name} does not fit {config.model_type}: its linear-attention layers mems a state of their own from "
                "token to token, and have no keys to update_memory; use a backbone with attention in every layer"
            )
        if config.model_type not in LAYOUTS:
            raise UserError(
                f"{name} does not fit {config.model_type}: how this architecture turns its keys by position is not mapped; "
                f"mapped: {', '.join(sorted(LAYOUTS))}"
            )
        full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        if not full:
            raise UserError(
                f"{name} does not fit this {config.model_type}: all its layers have sliding windows of "
                f"{config.sliding_window} tokens, which they keep by themselves; use sliding_window: null, or a backbone that "
                "mixes both kinds of layers"
            )
        if self.layers is None:
            self.layers = full
        if not self.layers or not set(self.layers) <= set(full):
            raise UserError(
                f"layers={self.layers}: memory goes into layers without a sliding window, at least one of them; of this "
                f"{config.model_type} these are {full}"
            )
        most = config.max_position_embeddings
        if LAYOUTS[config.model_type].positions and self.block > most:
            raise UserError(
                f"block={self.block}: {config.model_type} has learned positions for {most} tokens; give {most}"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window = config.sliding_window if len(full) < len(kinds) else 1
        self.shape = Shape(
            heads * width, config.num_attention_heads * width, len(set(self.layers)), len(full), len(kinds), window
        )

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """An open block, what is held of closed ones, and the last closed block, so that tokens can be taken back."""
        return self._cache(backbone, keeps=True)

    def _cache(self, backbone: Backbone, keeps: bool) -> SegmentCache:
        kinds = backbone.layer_types
        window = cast(Shape, self.shape).window
        layers = [
            SegmentLayer(
                self.update_memory if index in cast("list[int]", self.layers) else None,
                window - 1 if kind == "sliding_attention" else self.local_context,
            )
            for index, kind in enumerate(kinds)
        ]
        return SegmentCache(self.block, kinds, layers, self.rows, self.tbptt, keeps)

    # Reading

    def forward(
        self,
        backbone: Backbone,
        h_BTD: Tensor,
        position_ids: Tensor,
        cache: TokenCache | None = None,
        mask: Tensor | None = None,
        budget: Effort = FULL,
        labels_BT: Tensor | None = None,
    ) -> MethodOutput:
        """See `Method.forward`. Positions are counted here, from each text's first token; a budget changes nothing."""
        batch, tokens, _ = h_BTD.shape
        held = cast("SegmentCache | None", cache)
        new_BT = None if mask is None else mask[:, -tokens:].long()
        if new_BT is not None and bool((new_BT == 1).all()):
            new_BT = None
        passes_BT = torch.ones(batch, tokens, dtype=torch.long, device=h_BTD.device)
        if held is not None:
            held.start(batch)
            held.note(passes_BT, None if new_BT is None else new_BT > 0)
        if new_BT is None and (held is None or held.even):
            states_BTD = self._together(backbone, h_BTD, held)
        else:
            states_BTD = self._apart(backbone, h_BTD, new_BT, held)
        return MethodOutput(states_BTD, passes_BT)

    def _together(self, backbone: Backbone, h_BTD: Tensor, held: SegmentCache | None) -> Tensor:
        """All texts stand at the same place of their blocks, and all tokens are read."""
        batch, tokens, _ = h_BTD.shape
        if held is None:
            held = self._cache(backbone, keeps=False)
            held.start(batch)
        pieces, first = [], 0
        while first < tokens:
            stop = min(tokens, first + held.room(0))
            pieces.append(self._call(backbone, h_BTD[:, first:stop], [stop - first] * batch, held))
            first = stop
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _apart(self, backbone: Backbone, h_BTD: Tensor, new_BT: Tensor | None, held: SegmentCache | None) -> Tensor:
        """Texts that stand at different places, or several documents in one row: each is a text of its own, whose tokens are
        gathered for its next block. A call has the texts that have one more."""
        batch, tokens, _ = h_BTD.shape
        new_BT = torch.ones(batch, tokens, dtype=torch.long, device=h_BTD.device) if new_BT is None else new_BT
        at_N, count = _by_text(new_BT, documents=held is None)
        if held is None:
            held = self._cache(backbone, keeps=False)
            held.start(len(count))
        begin = torch.tensor([0, *count], device=h_BTD.device).cumsum(0)[:-1]
        h_MD, done = h_BTD.flatten(0, 1), [0] * len(count)
        order_L = torch.arange(self.block, device=h_BTD.device)
        found, places = [h_MD.new_zeros(0, h_MD.shape[-1])], [at_N[:0]]
        while any(have < every for have, every in zip(done, count, strict=True)):
            counts = [min(every - have, held.room(i)) for i, (have, every) in enumerate(zip(done, count, strict=True))]
            active = [text for text, number in enumerate(counts) if number]
            first_A = begin[active] + torch.tensor([done[text] for text in active], device=h_BTD.device)
            order_S = order_L[: max(counts)]
            place_AS = at_N[(first_A[:, None] + order_S).clamp(max=len(at_N) - 1)]
            valid_AS = order_S < torch.tensor([counts[text] for text in active], device=h_BTD.device)[:, None]
            states_ASD = self._call(backbone, h_MD[place_AS], counts, held)
            found.append(states_ASD[valid_AS])
            places.append(place_AS[valid_AS])
            done = [have + more for have, more in zip(done, counts, strict=True)]
        return torch.zeros_like(h_MD).index_put((torch.cat(places),), torch.cat(found)).view_as(h_BTD)

    def _call(self, backbone: Backbone, h_ASD: Tensor, counts: list[int], held: SegmentCache) -> Tensor:
        """One call of the decoder, within one block of each text."""
        turn = held.begin(backbone, counts, h_ASD)
        masks = held.masks(turn, h_ASD.device)
        positions_AS = turn.positions(h_ASD.device)
        attention = self.attention(backbone, held, h_ASD, positions_AS)
        return backbone.step(h_ASD, held.slots, masks, positions_AS, attention=attention)

    # The price

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Method.cost_schedule`. A step with a cache is priced at the mean over the places that it may have in its block."""
        size, memory = self.block, cast(Shape, self.shape).memory
        found: list[DecoderPass | MatMul] = []
        if context:
            blocks = context // size
            own = context + tokens if blocks == 0 else min(size, (size + tokens) / 2)
            if blocks:
                found += _times(self.products(blocks - 1), memory * tokens / size)
                found += _times(self.searches(tokens, blocks), memory)
            return [*found, DecoderPass(tokens, self._keys(blocks, own))]
        for blocks, first in enumerate(range(0, tokens, size)):
            rows = min(size, tokens - first)
            if blocks:
                found += _times(self.products(blocks - 1, training), memory)
                found += _times(self.searches(rows, blocks, training), memory)
            found.append(DecoderPass(rows, self._keys(blocks, rows)))
        return found

    def _keys(self, blocks: int, own: float) -> float:
        """Rows that a query is scored against, `own` of them in its block: the mean over the layers."""
        shape, seen = cast(Shape, self.shape), blocks * self.block
        carried = shape.full * min(self.local_context, seen) + (shape.layers - shape.full) * min(shape.window - 1, seen)
        return own + (shape.memory * self.attended(blocks) + carried) / shape.layers

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """The open block's rows, and those of the block before it."""
        closed = self._closed(tokens)
        return tokens - closed * self.block + (self.block if closed else 0)

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """Memory and carried rows, as they are and as they were one block before; no more for any further token."""
        closed = self._closed(tokens)
        return sum(self._held_bytes(blocks, number_bytes) for blocks in (closed, closed - 1) if blocks > 0)

    def _closed(self, tokens: int) -> int:
        return max(0, tokens - 1) // self.block

    def _held_bytes(self, blocks: int, number_bytes: int) -> float:
        shape, seen = cast(Shape, self.shape), blocks * self.block
        carried = shape.full * min(self.local_context, seen) + (shape.layers - shape.full) * min(shape.window - 1, seen)
        memory = shape.memory * (4 * self.numbers(blocks) + number_bytes * self.rows(blocks))
        return 2 * shape.kv_numbers * (memory + number_bytes * carried)


def _times(products: list[MatMul], count: float) -> list[MatMul]:
    return [MatMul(product.rows * count, product.weights, product.trained) for product in products]


def _by_text(number_BT: Tensor, documents: bool) -> tuple[Tensor, list[int]]:
    """The places of all tokens that are no padding, text by text, and how many each text has.

    Args:
        number_BT: 0 is padding, else the number of the document.
        documents: each document of a row is a text; else each row is one, even if it has no token here.

    Example:
        >>> _by_text(torch.tensor([[0, 1, 1], [1, 2, 2]]), documents=True)
        (tensor([1, 2, 3, 4, 5]), [2, 1, 2])
    """
    batch, tokens = number_BT.shape
    place_N = (number_BT.flatten() > 0).nonzero()[:, 0]
    text_N = place_N // tokens
    if not documents:
        return place_N, text_N.bincount(minlength=batch).tolist()
    text_N = text_N * (number_BT.max() + 1) + number_BT.flatten()[place_N]
    order_N = text_N.argsort(stable=True)
    _, count = text_N[order_N].unique_consecutive(return_counts=True)
    return place_N[order_N], count.tolist()

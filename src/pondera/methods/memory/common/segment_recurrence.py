"""Segment-level recurrence: base class of methods that read a sequence block by block with a memory of earlier blocks.

A sequence is split into blocks (segments) of L tokens. Each block is one call of the decoder: its tokens attend to each
other causally, and to the memory slots of earlier blocks, in one softmax. The layers never attend to more than memory
and one block, so compute and memory per token do not grow with the sequence.

Shapes: B batch, T tokens, N non-padding tokens of all sequences, A active sequences of a call, S tokens of a call, L
block, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.arch.families import listed, modules
from pondera.cache.attention import Server
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.memory.common.segment_cache import SegmentCache
from pondera.methods.memory.common.segment_layer import RecurrentState, SegmentLayer, fewer_rows
from pondera.models.backbone import Backbone
from pondera.models.method import Method, MethodOutput, SlotMaker, TokenBatch


@dataclass(frozen=True)
class Shape:
    """The sizes of a backbone that cost estimates need.

    Args:
        kv_numbers: numbers in the key of one token, and in its value: heads times head width.
        query_numbers: numbers in the query of one token.
        memory: number of layers with memory.
        full: number of layers without a sliding window.
        layers: number of layers.
        window: tokens that a sliding-window layer attends to.
    """

    kv_numbers: int
    query_numbers: int
    memory: int
    full: int
    layers: int
    window: int


class SegmentRecurrence(Method):
    """Reads a sequence block by block; each block also attends to memory slots.

    A subclass defines the memory: `rows` gives the number of slots, and `update_memory` computes them.

    Positions restart at the first token of each block, for rotary and learned positions. Layers with sliding windows
    keep their windows across block boundaries: the cached keys in the window are rotated to their positions before the
    block. These layers have no other memory, because their windows are bounded anyway.

    Args:
        block: L, tokens per block.
        local_context: number of last tokens before a block whose keys and values are kept exactly, in the layers with
            memory and the other layers without a sliding window. They get the positions before the block.
        tbptt: gradients are cut at every `tbptt`-th block boundary, so they reach back at most this many blocks;
            ``None``: never. Default: 2.
        layers: indices of the layers with memory; default: ``None``, all layers without a sliding window.
    """

    supports_recompute: bool = False
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
        """Number of memory slots for a block after this many closed blocks."""

    @abstractmethod
    def update_memory(
        self, state: RecurrentState, key_BHLd: Tensor, value_BHLd: Tensor, blocks: list[int]
    ) -> RecurrentState:
        """Computes a layer's memory when a block closes.

        Args:
            state: the previous result of this function; empty if no block has closed. For a sequence without closed
                blocks in a batch where others have some, its values are undefined.
            key_BHLd, value_BHLd: the block's keys, without positions, and values.
            blocks: number of earlier closed blocks of each sequence.

        Returns:
            ``rows_k`` and ``rows_v``, ``[B, H, W, d]``, the memory slots: the last `rows` of each sequence; and any
            other state that this function needs, ``[B, H, any, d]`` each.
        """

    def numbers(self, blocks: int) -> int:
        """Float32 numbers kept in addition to memory slots, per coordinate of keys and the same again for values."""
        return 0

    def products(self, blocks: int, gradient: bool = False) -> list[MatMul]:
        """Matrix products of `update_memory` in one layer, for one sequence with this many earlier closed blocks.

        With `gradient`, includes the backward pass.
        """
        return []

    def attended(self, blocks: int) -> int:
        """Memory slots that are part of the backbone's own attention, in layers with memory."""
        return self.rows(blocks)

    def searches(self, rows: float, blocks: int, gradient: bool = False) -> list[MatMul]:
        """Matrix products for reading memory outside the backbone's own attention, in one layer; see `products`."""
        return []

    def attention(self, backbone: Backbone, cache: SegmentCache, h_ASD: Tensor, position_AS: Tensor) -> Server | None:
        """The attention function for a call in place of the backbone's own, see `Backbone.step`; ``None``: keep it."""
        return fewer_rows if cache.mixed else None

    # Requirements on the backbone

    def bind(self, backbone: Backbone) -> None:
        """Raises if the backbone is not supported."""
        name, config = type(self).__name__, backbone.config
        kinds = backbone.layer_types
        if "linear_attention" in kinds:
            raise UserError(
                f"{name} does not fit {config.model_type}: its linear-attention layers have a recurrent state "
                "and no keys to store in memory; use a backbone with attention in every layer"
            )
        parts = modules(config)
        if parts is None:
            raise UserError(
                f"{name} does not fit {config.model_type}: the rotary layout of this architecture is not known; "
                f"supported: {listed(lambda each: each.modules)}"
            )
        full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        if not full:
            raise UserError(
                f"{name} does not fit this {config.model_type}: all its layers have sliding windows of "
                f"{config.sliding_window} tokens, so there is no layer for memory; use sliding_window: null, or a "
                "backbone that mixes both kinds of layers"
            )
        if self.layers is None:
            self.layers = full
        if not self.layers or not set(self.layers) <= set(full):
            raise UserError(
                f"layers={self.layers}: memory needs at least one layer without a sliding window; the layers of this "
                f"{config.model_type} without one are {full}"
            )
        most = config.max_position_embeddings
        if parts.positions and self.block > most:
            raise UserError(
                f"block={self.block}: {config.model_type} has learned positions for {most} tokens; give {most} or less"
            )
        heads, width = kv_heads(config), head_dim(config)
        window = config.sliding_window if len(full) < len(kinds) else 1
        self.shape = Shape(
            heads * width, config.num_attention_heads * width, len(set(self.layers)), len(full), len(kinds), window
        )

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """A cache with an open block, the state of closed blocks, and the last closed block for rollback."""
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

    # Forward pass

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Method.forward`. Positions are counted here from the start of each sequence; budgets are ignored."""
        h_BTD, segment_cache = batch.h_BTD, cast("SegmentCache | None", batch.cache)
        rows, tokens, _ = h_BTD.shape
        new_BT = None if batch.mask is None else batch.mask[:, -tokens:].long()
        if new_BT is not None and bool((new_BT == 1).all()):
            new_BT = None
        passes_BT = torch.ones(rows, tokens, dtype=torch.long, device=h_BTD.device)
        if segment_cache is not None:
            segment_cache.start(rows)
            segment_cache.note(passes_BT, None if new_BT is None else new_BT > 0)
        if new_BT is None and (segment_cache is None or segment_cache.even):
            states_BTD = self._together(backbone, h_BTD, segment_cache)
        else:
            states_BTD = self._apart(backbone, h_BTD, new_BT, segment_cache)
        return MethodOutput(states_BTD, passes_BT)

    def _together(self, backbone: Backbone, h_BTD: Tensor, cache: SegmentCache | None) -> Tensor:
        """All sequences are at the same position of their blocks, and there is no padding."""
        batch, tokens, _ = h_BTD.shape
        if cache is None:
            cache = self._cache(backbone, keeps=False)
            cache.start(batch)
        pieces, first = [], 0
        while first < tokens:
            stop = min(tokens, first + cache.room(0))
            pieces.append(self._call(backbone, h_BTD[:, first:stop], [stop - first] * batch, cache))
            first = stop
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _apart(self, backbone: Backbone, h_BTD: Tensor, new_BT: Tensor | None, cache: SegmentCache | None) -> Tensor:
        """Sequences at different positions, or several documents in one row: each document is then its own sequence.

        Each call gathers the tokens of the next block of every sequence that still has tokens.
        """
        batch, tokens, _ = h_BTD.shape
        new_BT = torch.ones(batch, tokens, dtype=torch.long, device=h_BTD.device) if new_BT is None else new_BT
        at_N, count = _by_sequence(new_BT, documents=cache is None)
        if cache is None:
            cache = self._cache(backbone, keeps=False)
            cache.start(len(count))
        begin = torch.tensor([0, *count], device=h_BTD.device).cumsum(0)[:-1]
        h_MD, done = h_BTD.flatten(0, 1), [0] * len(count)
        order_L = torch.arange(self.block, device=h_BTD.device)
        outputs, places = [h_MD.new_zeros(0, h_MD.shape[-1])], [at_N[:0]]
        while any(have < every for have, every in zip(done, count, strict=True)):
            counts = [min(every - have, cache.room(i)) for i, (have, every) in enumerate(zip(done, count, strict=True))]
            active = [sequence for sequence, number in enumerate(counts) if number]
            first_A = begin[active] + torch.tensor([done[sequence] for sequence in active], device=h_BTD.device)
            order_S = order_L[: max(counts)]
            place_AS = at_N[(first_A[:, None] + order_S).clamp(max=len(at_N) - 1)]
            valid_AS = order_S < torch.tensor([counts[sequence] for sequence in active], device=h_BTD.device)[:, None]
            states_ASD = self._call(backbone, h_MD[place_AS], counts, cache)
            outputs.append(states_ASD[valid_AS])
            places.append(place_AS[valid_AS])
            done = [have + more for have, more in zip(done, counts, strict=True)]
        return torch.zeros_like(h_MD).index_put((torch.cat(places),), torch.cat(outputs)).view_as(h_BTD)

    def _call(self, backbone: Backbone, h_ASD: Tensor, counts: list[int], cache: SegmentCache) -> Tensor:
        """One call of the decoder, within one block of each sequence."""
        step = cache.begin(backbone, counts, h_ASD)
        masks = cache.masks(step, h_ASD.device)
        positions_AS = step.positions(h_ASD.device)
        attention = self.attention(backbone, cache, h_ASD, positions_AS)
        return backbone.step(h_ASD, cache.slots, masks, positions_AS, attention=attention)

    # Cost

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Method.cost_schedule`. A step with a cache costs the mean over its possible positions in a block."""
        size, memory = self.block, cast(Shape, self.shape).memory
        schedule: list[DecoderPass | MatMul] = []
        if context:
            blocks = context // size
            own = context + tokens if blocks == 0 else min(size, (size + tokens) / 2)
            if blocks:
                schedule += _times(self.products(blocks - 1), memory * tokens / size)
                schedule += _times(self.searches(tokens, blocks), memory)
            return [*schedule, DecoderPass(tokens, self._keys(blocks, own))]
        for blocks, first in enumerate(range(0, tokens, size)):
            rows = min(size, tokens - first)
            if blocks:
                schedule += _times(self.products(blocks - 1, training), memory)
                schedule += _times(self.searches(rows, blocks, training), memory)
            schedule.append(DecoderPass(rows, self._keys(blocks, rows)))
        return schedule

    def _keys(self, blocks: int, own: float) -> float:
        """Keys that a query attends to, `own` of them in its block: the mean over the layers."""
        shape, seen = cast(Shape, self.shape), blocks * self.block
        carried = shape.full * min(self.local_context, seen) + (shape.layers - shape.full) * min(shape.window - 1, seen)
        return own + (shape.memory * self.attended(blocks) + carried) / shape.layers

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """The slots of the open block and of the previous block."""
        closed = self._closed(tokens)
        return tokens - closed * self.block + (self.block if closed else 0)

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """Memory and local context, with their copies from before the last block; constant in the number of tokens."""
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


def _by_sequence(number_BT: Tensor, documents: bool) -> tuple[Tensor, list[int]]:
    """The flat positions of all non-padding tokens, sequence by sequence, and the number of tokens of each.

    Args:
        number_BT: 0 is padding, else the document number.
        documents: if true, each document of a row is a sequence; else each row is one, even without tokens.

    Example:
        >>> _by_sequence(torch.tensor([[0, 1, 1], [1, 2, 2]]), documents=True)
        (tensor([1, 2, 3, 4, 5]), [2, 1, 2])
    """
    batch, tokens = number_BT.shape
    place_N = (number_BT.flatten() > 0).nonzero()[:, 0]
    sequence_N = place_N // tokens
    if not documents:
        return place_N, sequence_N.bincount(minlength=batch).tolist()
    sequence_N = sequence_N * (number_BT.max() + 1) + number_BT.flatten()[place_N]
    order_N = sequence_N.argsort(stable=True)
    _, count = sequence_N[order_N].unique_consecutive(return_counts=True)
    return place_N[order_N], count.tolist()

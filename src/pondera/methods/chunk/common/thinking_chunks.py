"""A concept module that a think method runs: its tokens are chunks.

Shapes: B batch, M chunks completed by the new tokens (the maximum over the batch), C columns of chunks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.masks import needed
from pondera.cache.state import CacheState
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import Effort
from pondera.core.errors import UserError
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.chunk.common.chunks import Chunks
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.models.backbone import Backbone


class ThinkingChunks(CacheState):
    """The cached chunks of all sequences, in columns, as the think method sees them.

    A call adds as many columns as the sequence with the most new chunks has. In the other sequences the remaining columns
    are padding. If the sequences of a batch complete their chunks in different calls, each of these calls adds a column.

    Args:
        slots: an empty cache of the think method.

    Attributes:
        tokens: number of tokens seen, which `crop` counts from.
        mask_BC: 1 where the column is a chunk of the sequence, 0 where it is padding; `None` before the first chunk.
        end_BC: index of each chunk's last token in its sequence.
    """

    holds: ClassVar[tuple[str, ...]] = ("slots", "tokens", "mask_BC", "end_BC")

    def __init__(self, slots: TokenCache) -> None:
        self.slots = slots
        self.clear()

    def clear(self) -> None:
        """See `CacheState.clear`."""
        self.slots.reset()
        self.tokens = 0
        self.mask_BC: Tensor | None = None
        self.end_BC: Tensor | None = None

    def get_seq_length(self) -> int:
        """The number of tokens seen, not of chunks."""
        return self.tokens

    def set_length(self, tokens: int) -> None:
        """See `CacheState.set_length`."""
        self.tokens = tokens

    @property
    def layers(self) -> list:
        """The layers of the think method's cache, for counting bytes."""
        return self.slots.layers

    def check_budget(self, think: Think, budget: Effort) -> None:
        """Raises before a call that the think method would refuse after the cache has changed.

        Raises:
            UserError: all chunks have the same number of slots, and earlier calls had another budget.
        """
        if think.interleaved and self.slots.tokens:
            held, wanted = self.slots.slots_per_token, budget.passes(think.slots_per_token)
            if held != wanted:
                raise UserError(
                    f"budget: the cache was filled with {held} passes per chunk and this call wants {wanted}; keep effort "
                    "and max_passes as they were, or start with a new cache"
                )

    def append(self, mask_BM: Tensor, end_BM: Tensor) -> Tensor:
        """Adds the columns of new chunks; returns the mask over all columns."""
        if self.mask_BC is not None and self.end_BC is not None:
            mask_BM, end_BM = torch.cat([self.mask_BC, mask_BM], 1), torch.cat([self.end_BC, end_BM], 1)
        self.mask_BC, self.end_BC = mask_BM, end_BM
        return mask_BM

    def _staying(self, tokens: int) -> tuple[Tensor, int]:
        """The mask of the chunks that end before a token, and the number of columns that stay."""
        assert self.mask_BC is not None and self.end_BC is not None
        mask_BC = torch.where(self.end_BC < tokens, self.mask_BC, 0)
        order_C = torch.arange(1, mask_BC.shape[1] + 1, device=mask_BC.device)
        return mask_BC, int(torch.where((mask_BC > 0).any(0), order_C, 0).amax())

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`."""
        if self.mask_BC is not None and (width := self._staying(tokens)[1]):
            self.slots.check_rollback(width)

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`.

        Columns at the end that are then padding in all sequences are removed. Other columns become padding in the sequences
        whose chunk is rolled back.
        """
        if self.mask_BC is None or self.end_BC is None:
            return
        mask_BC, width = self._staying(tokens)
        if not width:
            return self.clear()
        if removed := mask_BC.shape[1] - width:
            self.slots.crop(-removed)
        self.mask_BC, self.end_BC = mask_BC[:, :width], self.end_BC[:, :width]


def check_think(think: Think) -> None:
    """Raises if a method cannot run layers whose inputs are not tokens.

    Raises:
        UserError: it is not a think method, or it uses token embeddings or logits of tokens.
    """
    name = type(think).__name__
    if not isinstance(think, Think):
        raise UserError(f"think: {name} is not a think method; give one, such as think=PonderLM2(thoughts=1)")
    if think.needs_vocabulary:
        raise UserError(
            f"think: {name} {think.needs_vocabulary}, but a concept module runs on chunks and knows no tokens; use "
            "PonderLM2(thoughts=1), PonderLM3() or UniversalTransformer()"
        )


def think_about(
    chunks: Chunks,
    think: Think,
    module: Backbone,
    pooled_BMD: Tensor,
    position_BM: Tensor,
    cache: ThinkingChunks | None,
    seen: int,
    budget: Effort,
) -> MethodOutput:
    """Runs the concept module on new chunks; states ``[B, M, D]``, undefined at invalid chunks.

    Args:
        chunks: which sequence has which chunk; the others are padding.
        think: runs the module.
        module: the concept module.
        pooled_BMD: the inputs of the module.
        position_BM: position of each chunk.
        cache: earlier chunks; the new ones are appended.
        seen: number of earlier tokens.
        budget: compute per chunk.
    """
    mask_BC = torch.where(chunks.valid_BM, chunks.document_BM, 0)
    if cache is not None:
        mask_BC = cache.append(mask_BC, seen + chunks.end_BM)
    slots = None if cache is None else cache.slots
    thought = think(module, TokenBatch(pooled_BMD, position_BM, slots, needed(mask_BC), budget))
    if thought.deferred_loss is not None:
        raise UserError(
            f"think: {type(think).__name__} has a loss on logits of tokens, and a concept module has none; set its "
            "needs_vocabulary"
        )
    return thought


def thinking_calls(
    think: Think, layers: int, chunks: float, keys: int, training: bool, shares: Sequence[float]
) -> list[DecoderPass | MatMul]:
    """The cost schedule of a concept module that a think method runs.

    Args:
        think: runs the module.
        layers: layers of the module.
        chunks: new chunks in the mean call; below 1, the module runs less often.
        keys: new and earlier chunks.
        training: see `Method.cost_schedule`.
        shares: share of the chunks that takes each pass.
    """
    rows = max(1, round(chunks))
    often = chunks / rows
    return [
        replace(call, repeats=call.repeats * often, layers=layers)
        if isinstance(call, DecoderPass)
        else replace(call, rows=call.rows * often)
        for call in think.cost_schedule(rows, max(0, keys - rows), training, shares)
    ]

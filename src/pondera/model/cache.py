"""Caches for models that keep several slots (KV rows) per token.

Shapes: B batch, H heads, S slots, T tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import LongTensor, Tensor

from pondera.model.hf import Cache, CacheLayerMixin, DynamicLayer


class TokenCache(Cache):
    """A cache that speaks of tokens to `generate` and of slots to the backbone.

    A cache's length is used for positions, masks, slicing and stopping. With several slots per token that length must
    never be taken for a token count, so the two views are two objects over the same layers: this one counts tokens,
    `slots` counts rows.

    Args:
        layers: one cache layer per decoder layer.
        slots_per_token: rows that each token leaves in every layer.

    Attributes:
        slots: an ordinary `Cache` over the same layers, to hand to the backbone.
        tokens: tokens seen.
        passes_BT: passes that each cached token got.
    """

    def __init__(self, layers: list, slots_per_token: int) -> None:
        super().__init__(layers=layers)
        self.slots = Cache(layers=layers)
        self.slots_per_token = slots_per_token
        self.tokens = 0
        self.passes_BT: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; the number of rows is ``slots.get_seq_length()``."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Width and offset of a token-level mask."""
        return self.tokens + query_length, 0

    def record(self, passes_BT: Tensor) -> None:
        """Notes that these tokens are now cached, and the passes each got."""
        self.tokens += passes_BT.shape[1]
        self.passes_BT = passes_BT if self.passes_BT is None else torch.cat([self.passes_BT, passes_BT], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does)."""
        count = abs(tokens_to_remove)
        self.slots.crop(-count * self.slots_per_token)
        self.tokens -= count
        if self.passes_BT is not None and count:
            self.passes_BT = self.passes_BT[:, :-count]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.tokens, self.passes_BT = 0, None

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT.repeat_interleave(repeats, dim=0)

    def _rows(self, indices: Tensor) -> None:
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT[indices.to(self.passes_BT.device)]


class StagedLayer(CacheLayerMixin):
    """One decoder layer's rows, kept apart by thinking step.

    A query of step k reads the rows of steps 0..k and never those above, so each step owns a sub-cache and reading is a
    concatenation, oldest step first: no mask has to hide rows that should not be seen.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.parts = [DynamicLayer() for _ in range(num_steps)]
        self.step = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        for part in self.parts:
            part.lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores rows of the current step; returns keys and values of this and all lower steps, ``[B, H, S, d]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        own = self.parts[self.step].update(key_states, value_states)
        if self.step == 0:
            return own
        lower = [(part.keys, part.values) for part in self.parts[: self.step]]
        keys, values = zip(*lower, own, strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        """Rows that a query of the current step would find."""
        return sum(part.get_seq_length() for part in self.parts[: self.step + 1])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask for a query of the current step."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        for part in self.parts:
            part.reset()
        self.step, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last rows; the count is of rows over all steps together."""
        for part in self.parts:
            part.crop(-abs(tokens_to_remove) // len(self.parts))

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Rearranges the batch for beam search."""
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)


@contextmanager
def at_step(cache: TokenCache, step: int) -> Iterator[Cache]:
    """The slot view of a staged cache, with every layer set to one thinking step."""
    layers = cast("list[StagedLayer]", cache.layers)
    for layer in layers:
        layer.step = step
    try:
        yield cache.slots
    finally:
        for layer in layers:
            layer.step = 0

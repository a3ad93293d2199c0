"""Caches for models that keep several slots (KV rows) per token.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import LongTensor, Tensor

from pondera.cache.layer import KVLayer
from pondera.core.errors import UserError
from pondera.core.hf import Cache
from pondera.cost.model import live_cache_bytes


class TokenCache(Cache):
    """A cache that speaks of tokens to `generate` and of slots to the backbone.

    A cache's length is used for positions, masks, slicing and stopping. With several slots per token that length must
    never be taken for a token count, so the two views are two objects over the same layers: this one counts tokens,
    `slots` counts rows.

    Args:
        layers: one cache layer per decoder layer.
        slots_per_token: rows that each token leaves in every layer.
        slots: the view for the backbone; default: an ordinary `Cache` over the same layers.

    Attributes:
        slots: an ordinary `Cache` over the same layers, to hand to the backbone.
        tokens: tokens seen.
        passes_BT: passes that each cached token got.
    """

    def __init__(self, layers: list, slots_per_token: int, slots: Cache | None = None) -> None:
        super().__init__(layers=layers)
        self.slots = Cache(layers=layers) if slots is None else slots
        self.slots_per_token = slots_per_token
        self.tokens = 0
        self.passes_BT: Tensor | None = None

    @property
    def slots_per_token(self) -> int:
        """Rows that each token leaves in every layer; layers that code positions are told."""
        return self._slots_per_token

    @slots_per_token.setter
    def slots_per_token(self, slots: int) -> None:
        self._slots_per_token = slots
        for layer in self.layers:
            layer.slots_per_token = slots  # type: ignore[attr-defined]

    def nbytes(self) -> int:
        """Bytes of the storage of all layers, spare room included."""
        return live_cache_bytes(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; the number of rows is ``slots.get_seq_length()``."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Width and offset of a token-level mask."""
        return self.tokens + query_length, 0

    def hold(self) -> None:
        """More slots of the same tokens come: layers of a KV-cache method evict nothing before `record`."""
        for layer in self.layers:
            layer.hold = True  # type: ignore[attr-defined]

    def record(self, passes_BT: Tensor) -> None:
        """Notes that these tokens are now cached, and the passes each got."""
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.release(prompt=False)
        self.tokens += passes_BT.shape[1]
        self.passes_BT = passes_BT if self.passes_BT is None else torch.cat([self.passes_BT, passes_BT], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does)."""
        count = abs(tokens_to_remove)
        self.slots.crop(-count * self.slots_per_token)
        self.evict(count)

    def evict(self, count: int) -> None:
        """The last tokens are cached no more."""
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

    def save(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused: what a method keeps beside keys and values has no file format."""
        raise UserError(
            f"save: a {type(self).__name__} cannot be written to a file; save the text, and read it again with "
            "model(input_ids, use_cache=True)"
        )

    def _rows(self, indices: Tensor) -> None:
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT[indices.to(self.passes_BT.device)]

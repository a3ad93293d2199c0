"""A KV cache for models with several KV slots per token.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import LongTensor, Tensor

from pondera.cache.layer import KVLayer
from pondera.core.errors import UserError
from pondera.core.hf import Cache
from pondera.cost.measure import live_cache_bytes


class TokenCache(Cache):
    """A cache that counts tokens for `generate` and KV slots for the backbone.

    transformers uses the length of a cache for positions, masks, slicing and stopping. With several slots per token, the
    number of slots is not the number of tokens. Therefore two objects share the layers: this one counts tokens, and
    `slots` counts KV slots.

    Args:
        layers: one cache layer per decoder layer.
        slots_per_token: the number of slots that each token has in every layer.
        slots: the cache for the backbone; default: `None`, a `Cache` over the same layers.

    Attributes:
        slots: the cache for the backbone, over the same layers.
        tokens: the number of tokens seen.
        passes_BT: the number of passes of each cached token; `None` before the first token.
    """

    def __init__(self, layers: list, slots_per_token: int, slots: Cache | None = None) -> None:
        super().__init__(layers=layers)
        self.slots = Cache(layers=layers) if slots is None else slots
        self.slots_per_token = slots_per_token
        self.tokens = 0
        self.passes_BT: Tensor | None = None

    @property
    def slots_per_token(self) -> int:
        """The number of slots of each token in every layer; the setter passes it to the layers, which need it for positions."""
        return self._slots_per_token

    @slots_per_token.setter
    def slots_per_token(self, slots: int) -> None:
        self._slots_per_token = slots
        for layer in self.layers:
            layer.slots_per_token = slots  # type: ignore[attr-defined]

    def nbytes(self) -> int:
        """Bytes of the storage of all layers, including its unused part."""
        return live_cache_bytes(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen; ``slots.get_seq_length()`` is the number of slots."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Width and offset of a token-level mask."""
        return self.tokens + query_length, 0

    def hold(self) -> None:
        """Announces further slots of the same tokens: layers of a KV-cache method evict nothing before `record`."""
        for layer in self.layers:
            layer.hold = True  # type: ignore[attr-defined]

    def record(self, passes_BT: Tensor) -> None:
        """Ends a call: adds its tokens, with the number of passes of each, and releases the layers."""
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.release(prompt=False)
        self.tokens += passes_BT.shape[1]
        self.passes_BT = passes_BT if self.passes_BT is None else torch.cat([self.passes_BT, passes_BT], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Rolls back the last tokens (a negative number, as in transformers)."""
        count = abs(tokens_to_remove)
        self.slots.crop(-count * self.slots_per_token)
        self.evict(count)

    def evict(self, count: int) -> None:
        """Removes the last tokens from the count and from `passes_BT`."""
        self.tokens -= count
        if self.passes_BT is not None and count:
            self.passes_BT = self.passes_BT[:, :-count]

    def reset(self) -> None:
        """Resets the cache to its initial state."""
        super().reset()
        self.tokens, self.passes_BT = 0, None

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorders the batch rows for beam search."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these batch rows."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row."""
        super().batch_repeat_interleave(repeats)
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT.repeat_interleave(repeats, dim=0)

    def save(self, *args: object, **kwargs: object) -> NoReturn:
        """Not supported: the state of a think or chunk method has no file format."""
        raise UserError(
            f"save: a {type(self).__name__} cannot be saved to a file; save the token ids, and run them again with "
            "model(input_ids, use_cache=True)"
        )

    def _rows(self, indices: Tensor) -> None:
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT[indices.to(self.passes_BT.device)]

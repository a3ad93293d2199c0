"""A KV cache for models with several KV slots per token.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.io import save
from pondera.cache.layer import KVLayer
from pondera.cache.rollback import check_layers, roll_back
from pondera.cache.state import CacheState
from pondera.core.errors import UserError
from pondera.core.hf import Cache


class TokenCache(CacheState, Cache):
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
        prefix_BT: a hash of the tokens up to and including each cached one, if the method draws its decisions from it
            (`pondera.methods.think.common.halting`); `None` otherwise.
        methods: the spec strings of the methods that fill the cache; `None`: not known.
        model: what identifies the model of the cache, see `pondera.cache.identity`; empty: not known.
        unfinished: a call has ended in an error after it had begun to change the cache.
    """

    holds: ClassVar[tuple[str, ...]] = ("tokens", "passes_BT", "prefix_BT", "slots_per_token", "layers")

    def __init__(self, layers: list, slots_per_token: int, slots: Cache | None = None) -> None:
        super().__init__(layers=layers)
        self.slots = Cache(layers=layers) if slots is None else slots
        self.slots_per_token = slots_per_token
        self.methods: str | None = None
        self.model = ""
        self.clear()

    @property
    def slots_per_token(self) -> int:
        """The number of slots of each token in every layer; the setter passes it to the layers, which need it for positions."""
        return self._slots_per_token

    @slots_per_token.setter
    def slots_per_token(self, slots: int) -> None:
        self._slots_per_token = slots
        for layer in self.layers:
            layer.slots_per_token = slots  # type: ignore[attr-defined]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen; ``slots.get_seq_length()`` is the number of slots."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Width and offset of a token-level mask."""
        return self.tokens + query_length, 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a whole call of a model: an error inside, after the cache may have changed, makes the cache unusable.

        Raises:
            UserError: an earlier call has ended in such an error.
        """
        self._check_finished()
        seen, self.slots.begun = self.tokens, False  # type: ignore[attr-defined]
        try:
            yield
        except BaseException:
            self.unfinished = self.tokens != seen or self.slots.begun  # type: ignore[attr-defined]
            raise

    def _check_finished(self) -> None:
        if self.unfinished:
            raise UserError(
                "this cache contains half of a call that ended in an error; use a new cache, or call cache.reset() first"
            )

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

    def prefix_hashes(self) -> Tensor | None:
        """The hashes of the cached tokens, ``[B, tokens]``; `None`: none have been stored."""
        # A call that ended in an error before it changed the layers may have stored more.
        return None if self.prefix_BT is None or not self.tokens else self.prefix_BT[:, : self.tokens]

    def append_prefix_hashes(self, prefix_BT: Tensor) -> None:
        """Adds the hashes of the tokens of a call, before `record`; tokens before the first hashes get 0."""
        earlier_BT = self.prefix_hashes()
        if earlier_BT is None:
            earlier_BT = prefix_BT.new_zeros(len(prefix_BT), self.tokens)
        self.prefix_BT = torch.cat([earlier_BT, prefix_BT], dim=1)

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`."""
        slots = self.slots_per_token
        check_layers(self.layers, tokens * slots, (self.tokens - tokens) * slots)

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`."""
        slots = self.slots_per_token
        roll_back(self.layers, tokens * slots, (self.tokens - tokens) * slots)

    def set_length(self, tokens: int) -> None:
        """See `CacheState.set_length`."""
        self.tokens = tokens
        if self.passes_BT is not None:
            self.passes_BT = self.passes_BT[:, :tokens]
        if self.prefix_BT is not None:
            self.prefix_BT = self.prefix_BT[:, :tokens]

    def clear(self) -> None:
        """See `CacheState.clear`; `reset` also resets the layers."""
        self.tokens = 0
        self.passes_BT: Tensor | None = None
        self.prefix_BT: Tensor | None = None
        self.unfinished = False

    def reset(self) -> None:
        """Resets the cache and its layers to their initial state."""
        Cache.reset(self)
        self.clear()

    def save(self, path: str | Path) -> Path:
        """Writes the cache into a safetensors file; `AdaptiveLM.load_cache` reads it.

        Raises:
            UserError: some tokens may still be rolled back, the methods of the cache are not known, or a call has ended in
                an error.
        """
        self._check_finished()
        if self.methods is None:
            raise UserError("save: only a cache from model.new_cache() knows its methods; fill and save such a cache")
        return save(self, self.methods, path)

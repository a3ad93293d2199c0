"""Cache of a concept model: one KV slot per token for the backbone, one per chunk for the concept module.

Shapes: B batch, T new tokens, W tokens with stored encoder states, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import DynamicCache
from pondera.methods.chunk.common.thinking_chunks import ThinkingChunks
from pondera.methods.quantize.base import Quantizer
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker

REWIND = 32
"""At least this many of the last tokens, and all tokens of the last call, can be rolled back."""


class ConceptCache(TokenCache):
    """Tokens and the chunks that they complete; sequences of a batch may complete chunks at different times.

    Pooling a chunk needs the encoder states of all its tokens, so the cache stores these states, for as many of the
    last tokens as `crop` can roll back. A rollback is exact within a chunk and across chunk boundaries.

    Args:
        backbone: the layers that run on tokens.
        concepts: an empty cache of the chunks: with the number of each chunk's last token, or of a think method.
        chunk: k, tokens per chunk.
        quantizer: a folded quantizer, which decodes the predictions while this cache is in use.
        table: its tables, concatenated once; ``None``: get them from the quantizer for each chunk.
        kv_cache: a KV-cache method that keeps the slots of tokens, or `None`. Slots of chunks are few and all kept.

    Attributes:
        concepts: the KV slots of chunks.
        encoded_BWD: the encoder states of the last tokens.
        used_BWD: the prediction added to the state of each of these tokens.
        silent: true if the first call disabled concepts, so none are computed.
    """

    holds: ClassVar[tuple[str, ...]] = (*TokenCache.holds, "concepts", "encoded_BWD", "used_BWD", "silent")

    def __init__(
        self,
        backbone: Backbone,
        concepts: DepthCache | ThinkingChunks,
        chunk: int,
        quantizer: Quantizer,
        table: Tensor | None = None,
        kv_cache: SlotMaker | None = None,
    ) -> None:
        self.concepts = concepts
        view = DynamicCache(config=backbone.config) if kv_cache is None else kv_cache.token_cache(backbone.lm, 1).slots
        super().__init__(view.layers, 1, None if kv_cache is None else view)
        self.chunk, self.quantizer, self.table = chunk, quantizer, table

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.concepts.reset()
        self.encoded_BWD: Tensor | None = None
        self.used_BWD: Tensor | None = None
        self.silent = False

    def check_silent(self, silent: bool) -> None:
        """The first call decides whether this cache uses concepts.

        Raises:
            UserError: an earlier call decided otherwise.
        """
        if self.tokens == 0:
            self.silent = silent
        if self.silent != silent:
            filled, wanted = ("without", "with") if self.silent else ("with", "without")
            raise UserError(
                f"effort: the cache was filled {filled} concepts and this call is {wanted}; keep effort as it was, or "
                "start with a new cache"
            )

    def keep(self, encoded_BTD: Tensor, used_BTD: Tensor) -> None:
        """Stores the encoder states that a later call may need, and drops those that no rollback can reach."""
        wanted = max(encoded_BTD.shape[1], REWIND) + self.chunk - 1
        if self.encoded_BWD is not None and self.used_BWD is not None:
            encoded_BTD = torch.cat([self.encoded_BWD, encoded_BTD], dim=1)
            used_BTD = torch.cat([self.used_BWD, used_BTD], dim=1)
        self.encoded_BWD, self.used_BWD = encoded_BTD[:, -wanted:], used_BTD[:, -wanted:]

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`.

        Raises:
            UserError: more tokens than can be rolled back.
        """
        count = self.tokens - tokens
        if self.encoded_BWD is not None and count:
            width = self.encoded_BWD.shape[1]
            most = width if width == self.tokens else width - self.chunk + 1
            if count > most:
                raise UserError(
                    f"crop: cannot roll back {count} tokens; encoder states are kept for {most}; start with a new cache"
                )
        super().check_rollback(tokens)
        self.concepts.check_rollback(tokens)

    def rollback(self, tokens: int) -> None:
        """See `CacheState.rollback`."""
        count = self.tokens - tokens
        super().rollback(tokens)
        if self.encoded_BWD is not None and self.used_BWD is not None:
            self.encoded_BWD, self.used_BWD = (
                kept[:, : kept.shape[1] - count] for kept in (self.encoded_BWD, self.used_BWD)
            )
        self.concepts.tokens = self.tokens
        self.concepts.crop(-count)

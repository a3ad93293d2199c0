"""The cache of a model with concepts: a row per token for the backbone's layers, one per chunk for the concept module's.

Shapes: B batch, T new tokens, W tokens that are kept whole, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import DynamicCache
from pondera.methods.quantize.base import Quantizer
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker

REWIND = 32
"""So many of the last tokens, or those of the last call if they are more, can be taken back again."""


class ConceptCache(TokenCache):
    """Tokens, and the chunks that they have completed, in texts that may complete theirs at different times.

    A chunk that is not complete yet is pooled from the encoder's rows, so those are kept: of the last tokens only, as far
    back as a crop may reach. It is exact within and across the borders of chunks.

    Args:
        backbone: whose layers run on tokens.
        module: whose layers run on chunks.
        chunk: k, tokens per chunk.
        quantizer: folded: what predictions are decoded with while this cache is in use.
        table: its tables, so that they are joined once; none: they are asked for with each chunk.
        kv_cache: a KV-cache method that keeps the slots of tokens, or `None`. Slots of chunks are few and all kept.

    Attributes:
        concepts: the rows of chunks; each is noted under the number of its last token.
        encoded_BWD: the encoder's rows of the last tokens.
        used_BWD: what was predicted for the chunk that each of these tokens helps to predict.
        silent: no concepts are made, because the first call wanted none.
    """

    def __init__(
        self,
        backbone: Backbone,
        module: Backbone,
        chunk: int,
        quantizer: Quantizer,
        table: Tensor | None = None,
        kv_cache: SlotMaker | None = None,
    ) -> None:
        view = DynamicCache(config=backbone.config) if kv_cache is None else kv_cache.token_cache(backbone.lm, 1).slots
        super().__init__(view.layers, 1, None if kv_cache is None else view)
        self.concepts = DepthCache(module.config.num_hidden_layers, 1)
        self.chunk, self.quantizer, self.table = chunk, quantizer, table
        self.encoded_BWD: Tensor | None = None
        self.used_BWD: Tensor | None = None
        self.silent = False

    def check_silent(self, silent: bool) -> None:
        """The first call decides whether there are concepts.

        Raises:
            UserError: the cache was filled by a call that decided otherwise.
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
        """Notes what may be needed again of the new tokens, and forgets what no crop can reach any more."""
        wanted = max(encoded_BTD.shape[1], REWIND) + self.chunk - 1
        if self.encoded_BWD is not None and self.used_BWD is not None:
            encoded_BTD = torch.cat([self.encoded_BWD, encoded_BTD], dim=1)
            used_BTD = torch.cat([self.used_BWD, used_BTD], dim=1)
        self.encoded_BWD, self.used_BWD = encoded_BTD[:, -wanted:], used_BTD[:, -wanted:]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (given as a negative number, as transformers does).

        Raises:
            UserError: more of them than can be taken back.
        """
        count = abs(tokens_to_remove)
        if self.encoded_BWD is not None and self.used_BWD is not None and count:
            width = self.encoded_BWD.shape[1]
            most = width if width == self.tokens else width - self.chunk + 1
            if count > most:
                raise UserError(
                    f"crop: {count} tokens are to be forgotten, of which the encoder's rows are kept for {most}; start with "
                    "a new cache"
                )
            self.encoded_BWD, self.used_BWD = self.encoded_BWD[:, :-count], self.used_BWD[:, :-count]
        self.concepts.tokens = self.tokens
        self.concepts.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.concepts.reset()
        self.encoded_BWD, self.used_BWD = None, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        super().batch_repeat_interleave(repeats)
        self.concepts.batch_repeat_interleave(repeats)
        if self.encoded_BWD is not None and self.used_BWD is not None:
            self.encoded_BWD, self.used_BWD = (
                kept_BWD.repeat_interleave(repeats, dim=0) for kept_BWD in (self.encoded_BWD, self.used_BWD)
            )

    def _rows(self, indices: Tensor) -> None:
        super()._rows(indices)
        self.concepts.batch_select_indices(indices)
        if self.encoded_BWD is not None and self.used_BWD is not None:
            indices = indices.to(self.encoded_BWD.device)
            self.encoded_BWD, self.used_BWD = self.encoded_BWD[indices], self.used_BWD[indices]

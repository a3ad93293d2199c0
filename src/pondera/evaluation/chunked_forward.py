"""Chunked forward: feeds a sequence through the KV cache a few tokens at a time, as in decoding.

If a window were fed in one call, eviction would happen only at its end, and no score would show what was evicted.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pondera.core.hf import CACHE

if TYPE_CHECKING:
    from pondera.core.hf import Cache
    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.output import AdaptiveOutput

PIECE = 8
"""Tokens per chunk: small compared with any cache budget, but large enough to need few calls."""


def pieces(tokens: int, prompt: int, piece: int = PIECE) -> list[int]:
    """The lengths of the chunks: the prompt in one call, then `piece` tokens per call.

    Example:
        >>> pieces(21, prompt=10, piece=4)
        [10, 4, 4, 3]
    """
    rest = tokens - prompt
    lengths = [prompt, *[piece] * (rest // piece), rest % piece]
    return [length for length in lengths if length]


@torch.no_grad()
def chunked_outputs(
    model: AdaptiveLM,
    cache: Cache,
    ids_BT: Tensor,
    prompt: int = 0,
    piece: int = PIECE,
    budget: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, AdaptiveOutput]]:
    """Yields the index of each chunk's first token and the output of the model for the chunk.

    Args:
        model: in eval mode.
        cache: receives the keys and values of all tokens.
        ids_BT: token ids without padding.
        prompt: tokens of the first call (prefill).
        piece: tokens of each later call.
        budget: ``effort`` and ``max_passes``, as the model takes them.
    """
    start = 0
    for part_BT in ids_BT.split(pieces(ids_BT.shape[1], prompt, piece), dim=1):
        yield start, model(part_BT, **{CACHE: cache}, **(budget or {}))
        start += part_BT.shape[1]


def chunked_forward(
    model: AdaptiveLM,
    cache: Cache,
    ids_BT: Tensor,
    prompt: int = 0,
    piece: int = PIECE,
    budget: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields the index of each chunk's first token and the chunk's logits ``[B, t, V]``; arguments as `chunked_outputs`."""
    for start, out in chunked_outputs(model, cache, ids_BT, prompt, piece, budget):
        yield start, cast(Tensor, out.logits)

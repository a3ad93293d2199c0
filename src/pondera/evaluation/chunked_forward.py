"""Reads text through a cache, piece by piece, as a model with a memory does when it writes.

Given a whole window at once, a model forgets only after it has read all of it, and no score would show what was forgotten.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pondera.core.hf import Cache
    from pondera.models.adaptive_lm import AdaptiveLM

PIECE = 8
"""Tokens at a time: few beside any budget, and many fewer calls than tokens."""


def pieces(tokens: int, prompt: int, piece: int = PIECE) -> list[int]:
    """Lengths: the prompt in one go, then so many tokens at a time.

    Example:
        >>> pieces(21, prompt=10, piece=4)
        [10, 4, 4, 3]
    """
    rest = tokens - prompt
    found = [prompt, *[piece] * (rest // piece), rest % piece]
    return [length for length in found if length]


@torch.no_grad()
def chunked_forward(
    model: AdaptiveLM,
    cache: Cache,
    ids_BT: Tensor,
    prompt: int = 0,
    piece: int = PIECE,
    budget: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The logits of each piece, ``[B, t, V]``, and the number of its first token.

    Args:
        model: in eval mode.
        cache: filled on the way.
        ids_BT: no padding.
        prompt: tokens that are read in one go first.
        piece: tokens at a time after them.
        budget: ``effort`` and ``max_passes``, as the model takes them.
    """
    start = 0
    for part_BT in ids_BT.split(pieces(ids_BT.shape[1], prompt, piece), dim=1):
        yield start, model(part_BT, past_key_values=cache, **(budget or {})).logits
        start += part_BT.shape[1]

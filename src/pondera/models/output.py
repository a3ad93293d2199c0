"""The output of an `AdaptiveLM`.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pondera.core.hf import CACHE, Cache, ModelOutput
from pondera.core.loss_terms import LossTerm


@dataclass
class AdaptiveOutput(ModelOutput):
    """Output of `AdaptiveLM`.

    As a mapping it contains `loss`, `logits`, `passes` and the cache (under the name of the installed transformers), if they
    are not `None`; in training also `terms` and `trace`. In evaluation these two are attributes only, because accelerate
    can gather nothing but tensors from several processes.

    Args:
        loss: weighted sum of the means of the loss terms, if labels were given.
        logits: ``[B, T, V]``; `None` in training if the head computes its loss without them.
        cache: the KV cache, if one was used; same as `past_key_values`.
        passes: ``[B, T]``, passes of each token.
        terms: loss terms as sums and counts, by name.
        trace: records of the method.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE == "past_key_values":  # since 5.24 ModelOutput reads the old name from `cache`
        past_key_values: Cache | None = None
    cache: Cache | None = None
    passes: Tensor | None = None
    terms: dict[str, LossTerm] | None = None
    trace: dict[str, Any] | None = None

"""How well a model predicts held-out text."""

from __future__ import annotations

import math

import torch

from pondera.ground.data import Split
from pondera.jobs.batches import collate
from pondera.model.lm import AdaptiveLM


@torch.no_grad()
def score(
    model: AdaptiveLM, split: Split, context: int, max_tokens: int, batch_size: int = 8, isolate: bool = False
) -> dict[str, float]:
    """Next-token loss on the first windows of a split.

    The mode of the model and all random states are left as they were.

    Args:
        model: on any device.
        split: the text, usually ``corpus.validation``.
        context: tokens per window; each token sees at most this many.
        max_tokens: predict at most this many tokens, but at least one window.
        batch_size: windows per forward pass.
        isolate: tokens attend within their own document only.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``bits_per_byte`` (comparable between tokenizers), and the ``tokens``
        and ``bytes`` of text that were predicted.
    """
    windows = split.windows(context, isolate)
    count = min(len(windows), max(1, max_tokens // context))
    device = next(model.parameters()).device
    was_training, nats = model.training, 0.0
    model.eval()
    try:
        for start in range(0, count, batch_size):
            batch = collate([windows[index] for index in range(start, min(start + batch_size, count))])
            terms = model(**{name: tensor.to(device) for name, tensor in batch.items()}).terms
            nats += float(terms["next_token"].sum)
    finally:
        model.train(was_training)
    tokens = count * context
    num_bytes = split.num_bytes_of(1, tokens + 1)
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": tokens,
        "bytes": num_bytes,
    }

"""How well a model predicts held-out text.

Shapes: B batch, C context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.ground.data import Split
from pondera.jobs.batches import collate
from pondera.model.lm import IGNORED, AdaptiveLM


def score(
    model: AdaptiveLM,
    split: Split,
    context: int,
    max_tokens: int,
    batch_size: int = 8,
    isolate: bool = False,
    rank: int = 0,
    num_processes: int = 1,
    total: Callable[[float], float] = float,
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
        rank: of this process, where several share the windows.
        num_processes: that share them.
        total: sums a number over these processes.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``bits_per_byte`` (comparable between tokenizers), and the ``tokens``
        and ``bytes`` of text that were predicted.
    """
    windows = split.windows(context, isolate)
    count = min(len(windows), max(1, max_tokens // context))
    nats = 0.0
    for first in range(0, count, batch_size * num_processes):
        start = first + rank * batch_size
        mine = range(start, min(start + batch_size, count))
        # Who has nothing left runs a window for nothing: each forward pass of a sharded model takes all processes.
        found = nats_of(model, [windows[index] for index in mine or [0]])
        nats += found if mine else 0.0
    tokens = count * context
    return measures(total(nats), tokens, split.num_bytes_of(1, tokens + 1))


@torch.no_grad()
def nats_of(model: AdaptiveLM, windows: list[Mapping[str, Tensor]], start: int | None = None) -> float:
    """Summed next-token loss of windows of one length.

    Args:
        model: any mode; left as it was.
        windows: as `Windows` gives them.
        start: the id of a token that each window is read after, where the model wants one; it is not predicted.
    """
    batch = collate(windows)
    if start is not None:
        fillings = {"input_ids": start, "shift_labels": IGNORED, "document_ids": 1}
        batch = {name: F.pad(tensor_BC, (1, 0), value=fillings[name]) for name, tensor_BC in batch.items()}
    was_training = model.training
    model.eval()
    try:
        terms = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).terms
    finally:
        model.train(was_training)
    return float(terms["next_token"].sum)


def measures(nats: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """The summed loss as `score` returns it."""
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "tokens": tokens,
        "bytes": num_bytes,
    }

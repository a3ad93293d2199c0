"""Next-token loss of a model on held-out text.

Shapes: B batch, C context.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.data.corpus import Split
from pondera.data.sampler import collate
from pondera.data.task_corpus import TaskSplit
from pondera.evaluation.chunked_forward import chunked_outputs
from pondera.evaluation.pass_counts import pass_counts
from pondera.evaluation.permuted_passes import run_windows
from pondera.evaluation.task_score import sum_task_scores, task_measures
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.next_token import IGNORED


def score(
    model: AdaptiveLM,
    split: Split | TaskSplit,
    context: int,
    max_tokens: int,
    batch_size: int = 8,
    document_mask: bool = False,
    rank: int = 0,
    num_processes: int = 1,
    total: Callable[[Any], Any] | None = None,
    budget: dict[str, Any] | None = None,
    permute: bool = False,
) -> dict[str, Any]:
    """Next-token loss on windows that are spread evenly over a split, or the scores on a task.

    The function changes neither the mode of the model nor any random state.

    Args:
        model: on any device.
        split: the text or the task, usually ``corpus.validation``.
        context: tokens per window; each token sees at most this many.
        max_tokens: predict at most this many tokens, but at least one window.
        batch_size: windows per forward pass.
        document_mask: tokens attend within their own document only.
        rank: the rank of this process, if several processes share the windows.
        num_processes: the number of processes that share the windows.
        total: sums a `ScoreSums` or `TaskScores` over these processes.
        budget: ``effort`` and ``max_passes``, as the model takes them.
        permute: give the passes of each window to its tokens in random order (`pondera.evaluation.permuted_passes`).

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``bits_per_byte`` (comparable between tokenizers), the number of
        predicted ``tokens`` and their ``bytes``, ``passes_per_token``, and ``pass_shares``, the share of the tokens
        that took each pass. On a task there are no bytes, and `task_measures` lists the further scores.
    """
    windows, on_task = split.windows(context, document_mask), isinstance(split, TaskSplit)
    chosen = spread_evenly(max(1, max_tokens // context), len(windows))
    run = sum_task_scores if on_task else sum_scores
    sums: Any = None
    for first in range(0, len(chosen), batch_size * num_processes):
        start = first + rank * batch_size
        mine = chosen[start : start + batch_size]
        # A process without windows runs one anyway: all processes must join each forward pass of a sharded model.
        own: Any = run(model, [windows[index] for index in mine or chosen[:1]], budget=budget, permute=permute)
        own = own if mine else own.nothing()
        sums = own if sums is None else sums + own
    if total is not None:
        sums = total(sums)
    tokens = len(chosen) * context
    if on_task:
        return task_measures(sums, tokens)
    starts = [index * context + 1 for index in chosen]
    return measures(sums, tokens, sum(split.num_bytes_of(start, start + context) for start in starts))


def spread_evenly(count: int, of: int) -> list[int]:
    """At most `count` of the numbers below `of`, at equal distances.

    Example:
        >>> spread_evenly(3, 9), spread_evenly(5, 3)
        ([0, 3, 6], [0, 1, 2])
    """
    count = min(count, of)
    return [index * of // count for index in range(count)]


@dataclass(frozen=True)
class ScoreSums:
    """Summed loss and pass counts over some windows.

    Args:
        nats: the summed next-token loss.
        took: how many tokens took the first, second, third, ... pass.

    Example:
        >>> ScoreSums(2.0, (4, 1)) + ScoreSums(1.0, (3,))
        ScoreSums(nats=3.0, took=(7, 1))
    """

    nats: float = 0.0
    took: tuple[float, ...] = ()

    def __add__(self, other: ScoreSums) -> ScoreSums:
        took = itertools.zip_longest(self.took, other.took, fillvalue=0)
        return ScoreSums(self.nats + other.nats, tuple(a + b for a, b in took))

    def nothing(self) -> ScoreSums:
        """Sums of the same length that are all 0."""
        return ScoreSums(0.0, (0,) * len(self.took))

    def numbers(self) -> list[float]:
        """All sums in one list, to add them up over processes."""
        return [self.nats, *self.took]

    def with_numbers(self, numbers: list[float]) -> ScoreSums:
        """Sums of the same form from such a list."""
        return ScoreSums(numbers[0], tuple(numbers[1:]))


@torch.no_grad()
def sum_scores(
    model: AdaptiveLM,
    windows: list[Mapping[str, Tensor]],
    start: int | None = None,
    budget: dict[str, Any] | None = None,
    permute: bool = False,
) -> ScoreSums:
    """Scores windows of one length.

    Args:
        model: in any mode, which stays as it is.
        windows: from `Windows`.
        start: the id of a token to put before each window, such as BOS (default: `None`); it is not predicted.
        budget: ``effort`` and ``max_passes``, as the model takes them.
        permute: give the passes of each window to its tokens in random order (`pondera.evaluation.permuted_passes`).
    """
    batch = collate(windows)
    if start is not None:
        fillings = {"input_ids": start, "shift_labels": IGNORED, "document_ids": 1}
        batch = {name: F.pad(tensor_BC, (1, 0), value=fillings[name]) for name, tensor_BC in batch.items()}
    given = {name: tensor.to(model.device) for name, tensor in batch.items()}
    was_training = model.training
    model.eval()
    try:
        if model.kv_cache is not None:
            return _remembered(model, given["input_ids"], given["shift_labels"], budget)
        out = run_windows(model, {**given, **(budget or {})}, windows, permute)
    finally:
        model.train(was_training)
    return ScoreSums(float(out.terms["next_token"].sum), pass_counts(out.passes, math.ceil(model.passes())))


def _remembered(
    model: AdaptiveLM, ids_BC: Tensor, labels_BC: Tensor, budget: dict[str, Any] | None = None
) -> ScoreSums:
    """Scores windows chunk by chunk through the compressed KV cache of a model."""
    nats, passes = 0.0, []
    for start, out in chunked_outputs(model, model.new_cache(), ids_BC, budget=budget):
        logits_BCV = cast(Tensor, out.logits)
        labels_N = labels_BC[:, start : start + logits_BCV.shape[1]].flatten()
        nats += float(
            F.cross_entropy(logits_BCV.float().flatten(0, 1), labels_N, ignore_index=IGNORED, reduction="sum")
        )
        passes.append(cast(Tensor, out.passes))
    return ScoreSums(nats, pass_counts(torch.cat(passes, 1), math.ceil(model.passes())))


def measures(sums: ScoreSums, tokens: int, num_bytes: int) -> dict[str, Any]:
    """The scores that `score` returns, from sums over `tokens` tokens and `num_bytes` bytes."""
    loss = sums.nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": sums.nats / math.log(2) / num_bytes,
        "tokens": tokens,
        "bytes": num_bytes,
        "passes_per_token": sum(sums.took) / sums.took[0],
        "pass_shares": [count / sums.took[0] for count in sums.took],
    }

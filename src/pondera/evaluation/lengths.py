"""Scores of a run on a task at several lengths: what is left of its accuracy beyond the training length.

Shapes: B batch, C tokens per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core.errors import UserError
from pondera.evaluation.perplexity import batch_size, held_out
from pondera.inference.generate import effort_arguments
from pondera.inference.load import Loaded, load

if TYPE_CHECKING:
    from pondera.core.run_folder import Run
    from pondera.data.task_corpus import TaskSplit
    from pondera.models.adaptive_lm import AdaptiveLM


def evaluate_lengths(
    path: str | Path | Loaded,
    lengths: Sequence[int],
    max_tokens: int | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
) -> dict[str, Any]:
    """Scores a run on held-out windows of its task, of several lengths.

    Args:
        path: a run on a task, or what `load` returned for it.
        lengths: tokens per window; 1 or more different ones, shorter or longer than in training.
        max_tokens: read at most this many tokens at each length, but at least one window (default: `None`, as many as the
            held-out windows of the training length have).
        effort: ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
        max_passes: the maximum number of passes per token.

    Returns:
        ``name``, ``task``, the length of the windows in training as ``trained``, and ``lengths``: for each length what
        `length_scores` returns, in the order given.

    Raises:
        UserError: a length is given twice, is below 1, is too short for the task or exceeds the positions of the model; or
            this is not a run on a task.

    Example::

        evaluate_lengths("runs/states", [16, 32])["lengths"][1]["accuracy_beyond"]
    """
    _check_list(lengths)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: give 1 or more, or leave it out to score all held-out windows")
    loaded = path if isinstance(path, Loaded) else load(path)
    run, limit = _task_run(loaded), loaded.model.positions
    if limit is not None and max(lengths) > limit:
        raise UserError(f"lengths: {max(lengths)} exceeds the {limit} positions of this model; give {limit} or fewer")
    budget = effort_arguments(loaded.model, effort, max_passes)
    splits = [_split(loaded, run, length) for length in lengths]  # all are checked before the first is scored
    trained = run.config.data.context
    tokens = max_tokens or held_out(loaded, run, trained).num_tokens
    rows = [length_scores(loaded.model, split, trained, tokens, budget) for split in splits]
    return {"name": loaded.name, "task": run.config.data.task, "trained": trained, "lengths": rows}


def length_scores(
    model: AdaptiveLM, split: TaskSplit, trained: int, max_tokens: int, budget: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The scores on windows of one length.

    Args:
        model: on any device; it stays in its mode.
        split: the windows.
        trained: C of the training.
        max_tokens: read at most this many tokens, but at least one window.
        budget: ``effort`` and ``max_passes``, as the model takes them.

    Returns:
        ``length``; the scores of `TaskSums.scores`; ``accuracy_beyond`` and ``scored_beyond``, the accuracy and the number
        of the scored tokens at positions that training windows do not have (the accuracy is `None` if there are none); the
        number of ``tokens``, scored or not, and their ``passes_per_token``.
    """
    from pondera.evaluation.score import spread_evenly
    from pondera.evaluation.task_score import TaskSums, scored_tokens

    windows, size = split.windows(split.context), batch_size(split.context)
    chosen = spread_evenly(max(1, max_tokens // split.context), len(windows))
    every, beyond, passes = TaskSums(), TaskSums(), 0
    for first in range(0, len(chosen), size):
        found = scored_tokens(model, [windows[index] for index in chosen[first : first + size]], budget)
        every, beyond = every + found.sums(), beyond + found.sums(start=trained)
        passes += float(found.passes_BC.sum())
    tokens, scored_beyond = len(chosen) * split.context, int(beyond.by_level[:, 0].sum())
    return {
        "length": split.context,
        **every.scores(),
        "accuracy_beyond": beyond.scores()["accuracy"] if scored_beyond else None,
        "scored_beyond": scored_beyond,
        "tokens": tokens,
        "passes_per_token": passes / tokens,
    }


def _check_list(lengths: Sequence[int]) -> None:
    given = ", ".join(map(str, lengths))
    if not lengths or min(lengths) < 1:
        raise UserError(
            f"lengths: give one or more lengths of at least 1 token, such as 16, 32, 64; got {given or 'none'}"
        )
    if len(set(lengths)) < len(lengths):
        raise UserError(f"lengths: {given} names a length twice; give each once")


def _task_run(loaded: Loaded) -> Run:
    run = loaded.run
    if run is not None and run.config.data.task is not None:
        return run
    reason = "is not from a run" if run is None else f"was trained on text ({run.config.data.text})"
    raise UserError(
        f"lengths: scores a task at each length, and {loaded.name} {reason}; name a run that was trained with data.task, or "
        "give data.context to score a text in windows of another length"
    )


def _split(loaded: Loaded, run: Run, length: int) -> TaskSplit:
    try:
        return held_out(loaded, run, length)
    except UserError as error:  # a task names the setting of a training run
        raise UserError(str(error).replace("data.context", "lengths")) from None

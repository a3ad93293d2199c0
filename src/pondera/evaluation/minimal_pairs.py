"""``pondera eval --pairs``: how often a model finds the good text of a minimal pair more probable than the bad one."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pondera.core.errors import UserError
from pondera.data.text_rows import TextRow, read_text_rows
from pondera.data.tokenizer import check_ids, encode
from pondera.evaluation.binomial import share_interval
from pondera.evaluation.score import spread_evenly
from pondera.evaluation.short_texts import Scored, check_counts, document_start, most_tokens, score_texts
from pondera.evaluation.student_t import half_width
from pondera.inference.generate import effort_arguments
from pondera.inference.load import Loaded, load

COLUMNS = (("sentence_good", "sentence_bad"), ("good", "bad"))
"""The columns that are looked for: those of BLiMP, and short ones."""
GROUPS = ("UID", "field", "group")
"""The group columns that are looked for."""


def score_pairs(
    path: str | Path | Loaded,
    file: str | Path,
    columns: Sequence[str] | None = None,
    group: str | None = None,
    max_rows: int | None = None,
    context: int | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Scores a model on minimal pairs, the form of BLiMP: each row has a good text and a bad one.

    A pair is right if log p(good) > log p(bad). The log-probability of a text is the sum over all its tokens, the first one
    included: it is predicted from EOS, which ends the document before (from BOS, if the model is not from Pondera and its
    tokenizer has one). A tie, such as two equal texts, counts half.

    Args:
        path: what `pondera.inference.load.load` takes, or what it returned.
        file: a file with rows, such as JSON lines, also compressed as ``.xz`` or ``.gz``.
        columns: the names of the good and the bad column (default: `None`, the first of `COLUMNS` that the file has).
        group: the column to group pairs by (default: `None`, the first of `GROUPS` that the file has, if any).
        max_rows: score at most this many pairs, spread evenly over the file (default: `None`, all).
        context: the most tokens of a text (default: `None`, those of the run's windows, or the positions of the model).
        effort, max_passes: compute per token, as for `pondera.evaluation.perplexity.evaluate`.
        batch_size: texts per forward pass (default: `None`, by length). It does not change the scores.

    Returns:
        ``accuracy`` over ``rows`` pairs with Wilson's 95 % ``interval``, and the number of ``ties``. With groups also ``group``
        (the column), ``groups`` (``rows`` and ``accuracy`` of each), and ``macro_accuracy``, the mean over groups, with
        ``macro_interval``, its 95 % Student t interval over groups (`None` for one group). And ``tokens`` read,
        ``passes_per_token``, ``rows_per_second`` on this machine, ``columns`` and ``name``.

    Raises:
        UserError: a file without such rows, a text without a token, or one that is longer than `context`.

    Example::

        score_pairs("runs/ponderlm2", "blimp.jsonl.xz")["macro_accuracy"]
    """
    check_counts(max_rows, batch_size)
    found = read_text_rows(file, "--pairs", COLUMNS, columns, group, GROUPS)
    rows = [found.rows[index] for index in spread_evenly(max_rows or len(found.rows), len(found.rows))]
    loaded = path if isinstance(path, Loaded) else load(path)
    budget = effort_arguments(loaded.model, effort, max_passes)
    scores = score_texts(loaded, _whole_texts(loaded, rows, most_tokens(loaded, context)), budget, batch_size)
    good, bad = scores.nats[::2], scores.nats[1::2]
    points = [0.5 if one == other else float(one < other) for one, other in zip(good, bad, strict=True)]
    return {
        "name": loaded.name,
        **_shares(points),
        "ties": points.count(0.5),
        **({} if found.group is None else {"group": found.group, **_by_group(rows, points)}),
        **scores.cost(len(rows)),
        "columns": list(found.columns),
    }


def _whole_texts(loaded: Loaded, rows: list[TextRow], limit: int | None) -> list[Scored]:
    """Both texts of each row, one after the other."""
    start, scored = document_start(loaded), []
    check_ids([start], loaded.tokenizer, loaded.model.embedded)
    texts = encode([text for row in rows for text in row.texts], loaded.tokenizer, loaded.model.embedded)
    for number, (ids_T, _) in enumerate(texts):
        place = rows[number // 2].place
        if not len(ids_T):
            raise UserError(
                f"--pairs: {place} has a text without a token; remove the row, or name others with --columns"
            )
        if limit is not None and len(ids_T) > limit:
            most = loaded.model.positions
            fits = most is None or len(ids_T) <= most
            advice = (
                f"give --data.context {len(ids_T)} or more"
                if fits
                else f"the model has {most} positions: remove the row"
            )
            raise UserError(
                f"--pairs: {place} has a text of {len(ids_T)} tokens, more than the context of {limit}; {advice}"
            )
        scored.append(Scored((start, *ids_T.tolist())))
    return scored


def _shares(points: list[float]) -> dict[str, Any]:
    accuracy = statistics.fmean(points)
    return {"accuracy": accuracy, "interval": list(share_interval(accuracy, len(points))), "rows": len(points)}


def _by_group(rows: list[TextRow], points: list[float]) -> dict[str, Any]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for row, point in zip(rows, points, strict=True):
        by_name[str(row.group)].append(point)
    groups = {name: {"rows": len(mine), "accuracy": statistics.fmean(mine)} for name, mine in sorted(by_name.items())}
    means, count = [one["accuracy"] for one in groups.values()], len(groups)
    macro, interval = statistics.fmean(means), None
    if count > 1:
        margin = half_width(0.95, count - 1) * statistics.stdev(means) / math.sqrt(count)
        interval = [max(0.0, macro - margin), min(1.0, macro + margin)]
    return {"macro_accuracy": macro, "macro_interval": interval, "groups": groups}

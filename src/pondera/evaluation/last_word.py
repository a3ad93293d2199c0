"""``pondera eval --last-word``: whether a model predicts the last word of a text from all that comes before it."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera.core.errors import UserError
from pondera.data.text_rows import TextRow, read_text_rows
from pondera.data.tokenizer import check_ids, encode
from pondera.evaluation.binomial import share_interval
from pondera.evaluation.score import spread_evenly
from pondera.evaluation.short_texts import Scored, check_counts, document_start, most_tokens, score_texts
from pondera.inference.generate import effort_arguments
from pondera.inference.load import Loaded, load

COLUMNS = (("text",),)
LAST = re.compile(r"\S+$")

log = logging.getLogger(__name__)


def score_last_words(
    path: str | Path | Loaded,
    file: str | Path,
    columns: Sequence[str] | None = None,
    max_rows: int | None = None,
    context: int | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Scores a model on the last word of each text, the form of LAMBADA.

    The target is what follows the last white space of a text, without white space at the end; its tokens are all those with
    a character of it. A word is right if greedy decoding gives all its tokens, so if each is the most probable one after the
    true tokens before it. A text that is too long is cut on the left; the result says how many were.

    Args:
        path: what `pondera.inference.load.load` takes, or what it returned.
        file: a file with rows, such as JSON lines, also compressed as ``.xz`` or ``.gz``.
        columns: the name of the column of the text, in a list (default: `None`, ``["text"]``).
        max_rows: score at most this many texts, spread evenly over the file (default: `None`, all).
        context: the most tokens that are read (default: `None`, those of the run's windows, or the positions of the model).
        effort, max_passes: compute per token, as for `pondera.evaluation.perplexity.evaluate`.
        batch_size: texts per forward pass (default: `None`, by length). It does not change the scores.

    Returns:
        ``accuracy`` over ``rows`` texts with Wilson's 95 % ``interval``; ``nats_per_word``, the mean of -log p(word), and
        ``perplexity``, its exponential; ``log_probability_per_byte``, in nats, where a byte is one of the text that the target
        tokens stand for; ``tokens_per_word``; ``cut``, the number of texts that were cut, and the ``context`` (`None`: no
        limit). And ``tokens`` read, ``passes_per_token``, ``rows_per_second`` on this machine, ``columns`` and ``name``.

    Raises:
        UserError: a file without such rows, a text without a word, or a last word that is longer than `context`.

    Example::

        score_last_words("runs/ponderlm2", "lambada_test.jsonl.xz")["accuracy"]
    """
    check_counts(max_rows, batch_size)
    found = read_text_rows(file, "--last-word", COLUMNS, columns)
    rows = [found.rows[index] for index in spread_evenly(max_rows or len(found.rows), len(found.rows))]
    loaded = path if isinstance(path, Loaded) else load(path)
    budget, limit = effort_arguments(loaded.model, effort, max_passes), most_tokens(loaded, context)
    words = _last_words(loaded, rows, limit)
    cut = sum(not word.scored.starts for word in words)
    if cut:
        log.info("--last-word: %d of %d texts have more than %s tokens and are cut on the left", cut, len(words), limit)
    scores = score_texts(loaded, [word.scored for word in words], budget, batch_size)
    accuracy, nats = statistics.fmean(scores.greedy), statistics.fmean(scores.nats)
    return {
        "name": loaded.name,
        "accuracy": accuracy,
        "interval": list(share_interval(accuracy, len(rows))),
        "rows": len(rows),
        "nats_per_word": nats,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
        "log_probability_per_byte": -sum(scores.nats) / sum(word.num_bytes for word in words),
        "tokens_per_word": statistics.fmean(len(word.scored.ids) - word.scored.first for word in words),
        "cut": cut,
        "context": limit,
        **scores.cost(len(rows)),
        "columns": list(found.columns),
    }


@dataclass(frozen=True)
class Target:
    """A text whose last word is scored.

    Args:
        scored: its tokens.
        num_bytes: the bytes of the text that the scored tokens stand for.
    """

    scored: Scored
    num_bytes: int


def _last_words(loaded: Loaded, rows: list[TextRow], limit: int | None) -> list[Target]:
    """The tokens of each text; those of the last word are scored."""
    start, targets = document_start(loaded), []
    check_ids([start], loaded.tokenizer, loaded.model.embedded)
    texts = [row.texts[0].rstrip() for row in rows]
    encoded = encode(texts, loaded.tokenizer, loaded.model.embedded)
    for row, text, (ids_T, ends_T) in zip(rows, texts, encoded, strict=True):
        word = LAST.search(text)
        if word is None or not len(ids_T):
            raise UserError(
                f"--last-word: {row.place} has a text without a word; remove the row, or use another --columns"
            )
        first = int((ends_T <= len(text[: word.start()].encode())).sum())
        before = int(ends_T[first - 1]) if first else 0
        targets.append(Target(_cut((start, *ids_T.tolist()), first + 1, limit, row.place), int(ends_T[-1]) - before))
    return targets


def _cut(ids: tuple[int, ...], first: int, limit: int | None, place: str) -> Scored:
    """The tokens that fit: all but the last one are read, and the start token is dropped first."""
    over = 0 if limit is None else max(0, len(ids) - 1 - limit)
    if over >= first:
        raise UserError(
            f"--last-word: the last word of {place} has {len(ids) - first} tokens, more than the context of {limit}; "
            "remove the row, or give a larger --data.context"
        )
    return Scored(ids[over:], first - over, starts=not over)

"""Scores a trained model on a text, with the price of a token and the speed of decoding.

Shapes: T tokens of a text.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core import run_config
from pondera.core.errors import UserError, unknown
from pondera.core.hf import CACHE
from pondera.core.run_config import DataConfig
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.data.text import open_text
from pondera.data.tokenizer import fingerprint
from pondera.evaluation.long_text import LongText
from pondera.inference.generate import effort_arguments, start_token
from pondera.inference.load import Loaded, load
from pondera.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.models.adaptive_lm import AdaptiveLM

SETTINGS = ("text", "context", "column")
DECODED = 32  # tokens that the speed is measured on

log = logging.getLogger(__name__)


def evaluate(
    path: str | Path | Loaded,
    data: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
) -> dict[str, Any]:
    """Scores a model on a text.

    A run is scored on what was held out of its own text, in whole windows, as at the end of its training. Any other
    text is scored whole: tokenised as it stands (documents of a folder, file of rows or dataset in a row, with EOS
    between them), in windows that do not overlap, so that every token but the very first is predicted exactly once.
    A foreign model whose tokenizer begins texts with BOS reads it first in every window. A run with ``data.document_mask``
    reads the documents of other texts apart, too.

    Args:
        path: what `load` takes, or what it returned.
        data: ``text``, ``context`` and ``column`` as in a run's ``data`` (a leading ``data.`` may stay). By default the
            run's own; a model that is not from a run needs a ``text``.
        max_tokens: predict at most this many tokens; none: all.
        effort: how much thinking is wanted: ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
        max_passes: no token gets more passes.

    Returns:
        ``loss`` (nats per token), ``perplexity`` and ``bits_per_byte`` over ``tokens`` predicted tokens that spell
        ``bytes`` bytes; ``passes_per_token`` as measured (``pass_shares``: the share of the tokens that took each pass), and
        with it ``inference_flops_per_token`` and ``kv_bytes_per_token`` (none where the architecture has no price yet);
        ``tokens_per_second`` of decoding one sequence: 32 greedy tokens with a cache,
        on this machine, after a warm-up; ``context`` and ``name``.

    Raises:
        UserError: no model, no such text, a text that is empty or binary, a context that the model has no positions
            for, or a run whose text is not what it was.

    Example::

        evaluate("runs/ponderlm2", {"text": "book.txt"})["bits_per_byte"]
    """
    given = given_settings(data or {})
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: give 1 or more, or leave it out for all of the text")
    source = open_text(given["text"], given.get("column", "text")) if "text" in given else None
    loaded = path if isinstance(path, Loaded) else load(path)
    model, run, budget = loaded.model, loaded.run, effort_arguments(loaded.model, effort, max_passes)
    context = context_of(given.get("context"), loaded)
    if run is not None and (source is None or _is_own(run.config.data, given)):
        found = _score_held_out(loaded, run, context, max_tokens, budget)
    elif source is not None:
        if run is not None:
            _warn_of_overlap(run, given["text"])
        text = LongText.read(source, given["text"], loaded.tokenizer, max_tokens, loaded.model.embedded)
        found = _score_whole(loaded, text, context, budget)
    else:
        raise UserError("data.text: this model is not from a run; say what to score it on, e.g. --data.text book.txt")
    return {
        "name": loaded.name,
        **found,
        "context": context,
        **_prices(model, context, found["pass_shares"], budget),
        "tokens_per_second": _decoding_speed(model, loaded.tokenizer, budget),
    }


def given_settings(data: dict[str, Any]) -> dict[str, Any]:
    """The settings by their bare names, read and checked as a run's are."""
    tree: dict[str, Any] = {}
    for key, value in data.items():
        name = key.removeprefix("data.")
        if name not in SETTINGS:
            reason = "the model brings its own" if name == "tokenizer" else f"eval takes {', '.join(SETTINGS)}"
            known = f"data.{name}" in run_config.fields()
            raise UserError(f"data.{name}: {reason}") if known else unknown("setting", key, SETTINGS)
        tree[name] = run_config.scalar(value) if name == "context" and isinstance(value, str) else value
    checked = run_config.from_dict({"data": tree}).data
    return {name: getattr(checked, name) for name in tree}


def context_of(given: int | None, loaded: Loaded) -> int:
    limit = loaded.model.positions
    own = loaded.run.config.data.context if loaded.run else min(DataConfig().context, limit or DataConfig().context)
    context = own if given is None else given
    least = 1 + (_first_token(loaded) is not None)
    if context < least:
        after = " after BOS" * (least - 1)
        raise UserError(f"data.context: a window needs at least 1 token{after}, got {context}; give {least} or more")
    if limit is not None and context > limit:
        raise UserError(f"data.context: {context} exceeds the {limit} positions of this model; give {limit} or less")
    return context


def _is_own(data: DataConfig, given: dict[str, Any]) -> bool:
    """Whether a text is the one that a run was trained on, however its path is spelled."""
    column = given.get("column", data.column)
    if (given["text"], column) == (data.text, data.column):
        return True
    if not Path(data.text).expanduser().exists():
        return False
    return open_text(given["text"], column).digest == open_text(data.text, data.column).digest


def _warn_of_overlap(run: Run, text: str) -> None:
    """Says so where a text is a part of what the run was trained on, or the other way round."""
    own, other = (Path(name).expanduser() for name in (run.config.data.text, text))
    if own.exists() and other.exists():
        own, other = own.resolve(), other.resolve()
        if own.is_relative_to(other) or other.is_relative_to(own):
            log.warning(
                "data.text: part of this text was trained on (%s); the score says little about other text",
                run.config.data.text,
            )


def _corpus_digest(run: Run) -> str | None:
    """Of the text that the run was trained on, as its result or its last checkpoint tells."""
    if (result := run.result()) is not None:
        return result.get("corpus")
    for folder in reversed(run.checkpoints()):
        with suppress(OSError, ValueError):  # a damaged one; `load` has said so
            return checkpoints.read_state(folder).get("corpus")
    return None


def _score_held_out(
    loaded: Loaded, run: Run, context: int, max_tokens: int | None, budget: dict[str, Any]
) -> dict[str, Any]:
    from pondera.evaluation.score import score

    corpus = prepare(replace(run.config.data, context=context))
    trained_on, same = _corpus_digest(run), fingerprint(corpus.tokenizer()) == fingerprint(loaded.tokenizer)
    if not same or trained_on not in (None, corpus.digest):
        raise UserError(
            f"data.text: {run.config.data.text!r} is not what it was when {loaded.name} was trained, so what was held "
            "out is not known; give another --data.text, one that it has not seen"
        )
    held_out = corpus.validation
    tokens, document_mask = max_tokens or held_out.num_tokens, run.config.data.document_mask
    return score(loaded.model, held_out, context, tokens, _batch_size(context), document_mask, budget=budget)


def _score_whole(loaded: Loaded, text: LongText, context: int, budget: dict[str, Any]) -> dict[str, Any]:
    """The full windows, and the shorter one at the end."""
    from pondera.evaluation.score import ScoreSums, measures, sum_scores

    model, start = loaded.model, _first_token(loaded)
    document_mask = loaded.run is not None and loaded.run.config.data.document_mask
    size = context - (start is not None)
    windows, batch_size, found = text.windows(size, document_mask), _batch_size(context), ScoreSums()
    for first in range(0, len(windows), batch_size):
        last = min(first + batch_size, len(windows))
        found += sum_scores(model, [windows[index] for index in range(first, last)], start, budget)
    tokens = text.num_tokens - 1
    if rest := tokens % size:
        found += sum_scores(model, [text.after(tokens - rest).windows(rest, document_mask)[0]], start, budget)
    return measures(found, tokens, text.num_bytes_of(1, tokens + 1))


def _first_token(loaded: Loaded) -> int | None:
    """BOS, if a foreign model's tokenizer begins texts with it; Pondera trains on texts without."""
    first = loaded.tokenizer("").input_ids[:1] if loaded.foreign else []
    return first[0] if first == [loaded.tokenizer.bos_token_id] else None


def _batch_size(context: int) -> int:
    return max(1, 2048 // context)


def _prices(model: AdaptiveLM, context: int, shares: list[float], budget: dict[str, Any]) -> dict[str, float | None]:
    from pondera.core.effort import Effort
    from pondera.evaluation.cost_report import cost_report

    keys = ("inference_flops_per_token", "kv_bytes_per_token")
    try:
        found = cost_report(model, context, shares=shares, budget=Effort.of(**budget))
    except UserError:  # the scores are worth having without the price
        return dict.fromkeys(keys)
    return {key: found[key] for key in keys}


def _decoding_speed(model: Any, tokenizer: PreTrainedTokenizerFast, budget: dict[str, Any]) -> float:
    import torch

    limit = model.positions or DECODED + 1
    count = min(DECODED, limit - 1)
    start_BT = torch.tensor([[start_token(tokenizer)]], device=model.device)

    def decode(tokens: int) -> float:
        began = time.perf_counter()
        ids_BT = model.generate(
            start_BT,
            attention_mask=torch.ones_like(start_BT),
            **{CACHE: model.new_cache()},
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            **budget,
        )
        ids_BT.tolist()  # waits for the device
        return time.perf_counter() - began

    decode(min(4, count))
    return count / decode(count)

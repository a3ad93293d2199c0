"""Perplexity and bits per byte of a model on a text, with the cost per token and the decoding speed.

Shapes: T tokens of a text.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.core import run_config
from pondera.core.errors import UserError, unknown
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
DECODED = 32  # tokens generated to measure the speed

log = logging.getLogger(__name__)


def evaluate(
    path: str | Path | Loaded,
    data: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    effort: str | float | None = None,
    max_passes: int | None = None,
) -> dict[str, Any]:
    """Scores a model on a text.

    Without a text, a run is scored on the held-out part of its own text, in whole windows, as at the end of training. Any
    other text is scored completely: its documents are joined with EOS and cut into windows that do not overlap, so every
    token except the first is predicted exactly once. If the tokenizer of a foreign model starts sequences with BOS, each
    window starts with BOS. A run with ``data.document_mask`` also masks documents in other texts.

    Args:
        path: what `load` takes, or what it returned.
        data: ``text``, ``context`` and ``column`` as in a run's ``data``; the prefix ``data.`` is optional (default: the
            run's own settings). A model that is not from a run needs a ``text``.
        max_tokens: predict at most this many tokens (default: `None`, all).
        effort: ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
        max_passes: the maximum number of passes per token.

    Returns:
        ``loss`` (nats per token), ``perplexity`` and ``bits_per_byte`` over ``tokens`` predicted tokens with ``bytes``
        bytes; the measured ``passes_per_token`` and ``pass_shares`` (the share of the tokens that took each pass);
        ``inference_flops_per_token`` and ``kv_bytes_per_token`` at these shares (`None` if the cost of the architecture
        is not known); ``tokens_per_second`` when decoding 32 greedy tokens of one sequence with a cache, on this machine
        and after a warm-up; ``context`` and ``name``.

    Raises:
        UserError: the model or the text does not exist, the text is empty or binary, the context exceeds the positions of
            the model, or the text of the run has changed.

    Example::

        evaluate("runs/ponderlm2", {"text": "book.txt"})["bits_per_byte"]
    """
    given = given_settings(data or {})
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: give 1 or more, or leave it out to score the whole text")
    source = open_text(given["text"], given.get("column", "text")) if "text" in given else None
    loaded = path if isinstance(path, Loaded) else load(path)
    model, run, budget = loaded.model, loaded.run, effort_arguments(loaded.model, effort, max_passes)
    context = context_of(given.get("context"), loaded)
    if model.kv_cache is not None and run is not None and run.config.data.document_mask:
        log.warning(
            "data.document_mask: not used with a kv_cache method; tokens also attend to earlier documents of a window"
        )
    if run is not None and (source is None or _is_own(run.config.data, given)):
        scores = _score_held_out(loaded, run, context, max_tokens, budget)
    elif source is not None:
        if run is not None:
            _warn_of_overlap(run, given["text"])
        text = LongText.read(source, given["text"], loaded.tokenizer, max_tokens, loaded.model.embedded)
        scores = _score_whole(loaded, text, context, budget)
    else:
        raise UserError("data.text: this model is not from a run; give the text to score, e.g. --data.text book.txt")
    return {
        "name": loaded.name,
        **scores,
        "context": context,
        **_prices(model, context, scores["pass_shares"], budget),
        "tokens_per_second": _decoding_speed(model, loaded.tokenizer, budget),
    }


def given_settings(data: dict[str, Any]) -> dict[str, Any]:
    """The settings without the prefix ``data.``, parsed and checked like those of a run."""
    tree: dict[str, Any] = {}
    for key, value in data.items():
        name = key.removeprefix("data.")
        if name not in SETTINGS:
            reason = "the model has its own" if name == "tokenizer" else f"eval takes {', '.join(SETTINGS)}"
            known = f"data.{name}" in run_config.fields()
            raise UserError(f"data.{name}: {reason}") if known else unknown("setting", key, SETTINGS)
        tree[name] = run_config.scalar(value) if name == "context" and isinstance(value, str) else value
    checked = run_config.from_dict({"data": tree}).data
    return {name: getattr(checked, name) for name in tree}


def context_of(given: int | None, loaded: Loaded) -> int:
    """The context to evaluate with: the given one, or the default of the model; checked against its positions."""
    limit = loaded.model.positions
    own = loaded.run.config.data.context if loaded.run else min(DataConfig().context, limit or DataConfig().context)
    context = own if given is None else given
    least = 1 + (_first_token(loaded) is not None)
    if context < least:
        after = " after BOS" * (least - 1)
        raise UserError(f"data.context: a window needs at least 1 token{after}, got {context}; give {least} or more")
    if limit is not None and context > limit:
        raise UserError(f"data.context: {context} exceeds the {limit} positions of this model; give {limit} or fewer")
    return context


def _is_own(data: DataConfig, given: dict[str, Any]) -> bool:
    """Whether the given text is the text of the run, even if its path is written differently."""
    column = given.get("column", data.column)
    if (given["text"], column) == (data.text, data.column):
        return True
    if not Path(data.text).expanduser().exists():
        return False
    return open_text(given["text"], column).digest == open_text(data.text, data.column).digest


def _warn_of_overlap(run: Run, text: str) -> None:
    """Warns if the text contains training text of the run, or is part of it."""
    own, other = (Path(name).expanduser() for name in (run.config.data.text, text))
    if own.exists() and other.exists():
        own, other = own.resolve(), other.resolve()
        if own.is_relative_to(other) or other.is_relative_to(own):
            log.warning(
                "data.text: the model was trained on part of this text (%s); the score is not a held-out score",
                run.config.data.text,
            )


def _corpus_digest(run: Run) -> str | None:
    """The digest of the training text, from the result of the run or its last checkpoint."""
    if (result := run.result()) is not None:
        return result.get("corpus")
    for folder in reversed(run.checkpoints()):
        with suppress(OSError, ValueError):  # damaged; `load` has reported it already
            return checkpoints.read_state(folder).get("corpus")
    return None


def held_out(loaded: Loaded, run: Run, context: int) -> Any:
    """The held-out windows of the run of a model, of any length: a `Split` of its text, or a `TaskSplit` of its task.

    Raises:
        UserError: the text of the run has changed since the training, or the windows are too short for its task.
    """
    corpus = prepare(replace(run.config.data, context=context))
    trained_on, same = _corpus_digest(run), fingerprint(corpus.tokenizer()) == fingerprint(loaded.tokenizer)
    if not same or trained_on not in (None, corpus.digest):
        raise UserError(
            f"data.text: {run.config.data.text!r} has changed since {loaded.name} was trained, so the held-out part is "
            "not known; give another --data.text that the model was not trained on"
        )
    return corpus.validation


def _score_held_out(
    loaded: Loaded, run: Run, context: int, max_tokens: int | None, budget: dict[str, Any]
) -> dict[str, Any]:
    from pondera.evaluation.permuted_passes import permuted_scores
    from pondera.evaluation.score import score

    split = held_out(loaded, run, context)
    tokens, document_mask = max_tokens or split.num_tokens, run.config.data.document_mask
    run_it = partial(score, loaded.model, split, context, tokens, batch_size(context), document_mask, budget=budget)
    return run_it() | (permuted_scores(loaded.model, run_it) if run.config.data.task else {})


def _score_whole(loaded: Loaded, text: LongText, context: int, budget: dict[str, Any]) -> dict[str, Any]:
    """Scores the full windows and the shorter one at the end."""
    from pondera.evaluation.score import ScoreSums, measures, sum_scores

    model, start = loaded.model, _first_token(loaded)
    document_mask = loaded.run is not None and loaded.run.config.data.document_mask
    size = context - (start is not None)
    windows, count, sums = text.windows(size, document_mask), batch_size(context), ScoreSums()
    for first in range(0, len(windows), count):
        last = min(first + count, len(windows))
        sums += sum_scores(model, [windows[index] for index in range(first, last)], start, budget)
    tokens = text.num_tokens - 1
    if rest := tokens % size:
        sums += sum_scores(model, [text.after(tokens - rest).windows(rest, document_mask)[0]], start, budget)
    return measures(sums, tokens, text.num_bytes_of(1, tokens + 1))


def _first_token(loaded: Loaded) -> int | None:
    """BOS if the tokenizer of a foreign model starts sequences with it, else `None`; Pondera trains without BOS."""
    first = loaded.tokenizer("").input_ids[:1] if loaded.foreign else []
    return first[0] if first == [loaded.tokenizer.bos_token_id] else None


def batch_size(context: int) -> int:
    """The number of windows that are scored in one call."""
    return max(1, 2048 // context)


def _prices(model: AdaptiveLM, context: int, shares: list[float], budget: dict[str, Any]) -> dict[str, float | None]:
    from pondera.core.effort import Effort
    from pondera.evaluation.cost_report import cost_report

    keys = ("inference_flops_per_token", "kv_bytes_per_token")
    try:
        costs = cost_report(model, context, shares=shares, budget=Effort.of(**budget))
    except UserError:  # the cost is unknown, but the scores are useful without it
        return dict.fromkeys(keys)
    return {key: costs[key] for key in keys}


def _decoding_speed(model: Any, tokenizer: PreTrainedTokenizerFast, budget: dict[str, Any]) -> float:
    import torch

    from pondera.core.hf import CACHE

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

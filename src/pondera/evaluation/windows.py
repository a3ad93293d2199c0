"""Held-out windows for measuring KV cache methods.

Shapes: N windows, B batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.data.corpus import prepare
from pondera.data.task_corpus import TaskSplit
from pondera.data.text import Source, open_text
from pondera.data.tokenizer import encode
from pondera.evaluation.long_text import LongText, documents
from pondera.evaluation.perplexity import context_of, given_settings
from pondera.inference.load import Loaded

if TYPE_CHECKING:
    from pondera.data.corpus import Split

ASKED, LEAST = 24, 32
"""Maximum tokens of the passage that is repeated to measure recall; minimum tokens of a window."""
CONTEXT = 1024
"""Tokens of a window for a model that is not from a run, if it has as many positions."""
TOGETHER = 2048
"""Approximate tokens of a calibration batch."""
SAFE, LONG = 4, 16
"""Characters of a token: fewer than a token has on average in most texts, so that windows need not overlap; and more."""
LONGEST = 2**28
"""Characters of a calibration text that are read at most."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutWindows:
    """Windows of held-out text.

    Args:
        ids_NT: windows of `context` + 1 tokens; the last token is only predicted.
        num_bytes: bytes of the scored tokens.
        prompt: tokens of each window that are prefilled in one call and not scored.
        asked_NT: the same windows with an early passage repeated at the end.
        asked: tokens of that passage; its first third is the cue and is not counted.
    """

    ids_NT: Tensor
    num_bytes: int
    prompt: int
    asked_NT: Tensor
    asked: int

    @classmethod
    def cut(cls, split: Split, context: int, count: int, seed: int = 0) -> HeldOutWindows:
        """Takes the first windows of a split; half of each window is the prompt.

        Raises:
            UserError: the split has no whole window, or the windows are too short.
        """
        windows = split.windows(context, False)
        count = min(count, len(windows))
        if context < LEAST:
            raise UserError(f"data.context: {context} tokens are too few to compress; give {LEAST} or more")
        if not count:
            raise UserError(
                f"the held-out text has {split.num_tokens} tokens, and a window needs {context + 1}; give a longer "
                "--data.text, or a smaller --data.context"
            )
        one = [windows[number] for number in range(count)]
        ids_NT = torch.stack([torch.cat([w["input_ids"], w["targets"][-1:]]) for w in one])
        prompt, asked = context // 2, min(ASKED, context // 4)
        num_bytes = sum(split.num_bytes_of(n * context + prompt + 1, (n + 1) * context + 1) for n in range(count))
        draw = torch.Generator().manual_seed(seed)
        # Passages come from the middle of the prompt: many methods keep the first and the most recent tokens.
        begins = torch.randint(context // 8, prompt, (count,), generator=draw).tolist()
        passages = [ids_T[begin : begin + asked] for ids_T, begin in zip(ids_NT, begins, strict=True)]
        return cls(ids_NT, num_bytes, prompt, torch.cat([ids_NT[:, :context], torch.stack(passages)], dim=1), asked)


def held_out(loaded: Loaded, data: Mapping[str, Any], count: int) -> HeldOutWindows:
    """Windows of the given text, else of what the run held out of its own, else of the standard library of this Python.

    Args:
        loaded: the model; its tokenizer tokenises the text.
        data: ``text``, ``context`` and ``column``, as `pondera.evaluation.perplexity.evaluate` takes them.
        count: the maximum number of windows.

    Raises:
        UserError: the text is too short, or the run was trained on a task.
    """
    given = given_settings(dict(data))
    if loaded.run is None:
        given.setdefault("context", min(CONTEXT, loaded.model.positions or CONTEXT))
        if "text" not in given:
            log.warning("no --data.text is given, so the standard library of this Python is the text")
            given["text"] = "stdlib"
    context = context_of(given.get("context"), loaded)
    limit = loaded.model.positions
    if limit is not None:
        context = min(context, limit - ASKED)  # leaves positions for the repeated passage
    if "text" in given:
        source = open_text(given["text"], given.get("column", "text"))
        text = LongText.read(source, given["text"], loaded.tokenizer, count * context, loaded.model.embedded)
        return HeldOutWindows.cut(text, context, count)
    assert loaded.run is not None
    split = prepare(loaded.run.config.data).validation
    if isinstance(split, TaskSplit):
        raise UserError(
            f"{loaded.name} was trained on the task {loaded.run.config.data.task}, and a KV cache is measured on text; give a "
            "model that was trained on text"
        )
    return HeldOutWindows.cut(split, context, count)


def calibration(loaded: Loaded, text: str | None, tokens: int, context: int) -> list[Tensor]:
    """Token ids ``[B, T]`` to fit codebooks to: windows that are spread evenly over the text.

    A codebook that has seen one document only codes other documents badly.

    Args:
        loaded: the model.
        text: a file, folder or dataset; default: `None`, the training text of a run, and nothing for other models.
        tokens: approximate number in total.
        context: T.

    Raises:
        UserError: a text that does not fill one window.
    """
    most = max(1, tokens // context)
    if text is not None:
        windows = spread_windows(open_text(text), text, loaded, context, most)
    elif loaded.run is not None:
        every = prepare(loaded.run.config.data).train.windows(context, False)
        windows: list[Tensor] = [every[number]["input_ids"] for number in _spread(len(every), most)]
    else:
        return []
    if not windows:
        raise UserError(
            f"--calibrate: this text has no window of {context + 1} tokens; give a longer one, or a smaller context"
        )
    return list(torch.stack(windows).split(max(1, TOGETHER // context)))


def spread_windows(source: Source, name: str, loaded: Loaded, context: int, most: int) -> list[Tensor]:
    """Windows ``[T]`` at even distances in a text, each tokenised alone; fewer, if they would overlap.

    Args:
        source: the documents.
        name: the source as the user gave it, for messages.
        loaded: the model; its tokenizer tokenises the text.
        context: T.
        most: maximum number of windows.
    """
    texts, size = [], 0
    for text in documents(source, name):
        texts.append(text)
        size += len(text)
        if size >= LONGEST:
            break
    whole = "\n\n".join(texts)
    found = []
    for number in range(count := max(1, min(most, len(whole) // (SAFE * context)))):
        begin = number * (len(whole) // count)
        ids, _ = next(encode([whole[begin : begin + LONG * context]], loaded.tokenizer, loaded.model.embedded))
        if len(ids) > context:
            found.append(torch.tensor(ids[:context].astype("int64")))
    return found


def _spread(windows: int, most: int) -> list[int]:
    """Numbers of windows at even distances."""
    count = min(windows, most)
    return [number * windows // count for number in range(count)]

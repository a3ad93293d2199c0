"""The text that memories are fitted to and measured on.

Shapes: N windows, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.data.corpus import prepare
from pondera.data.text import open_text
from pondera.evaluation.long_text import LongText
from pondera.evaluation.perplexity import context_of, given_settings
from pondera.inference.load import Loaded

if TYPE_CHECKING:
    from pondera.data.corpus import Split

ASKED, LEAST = 24, 32
"""Tokens of an earlier passage that are repeated to see whether it is remembered, at most; and of a window, at least."""
TOGETHER = 2048
"""Tokens of a calibration batch, about."""


@dataclass(frozen=True)
class HeldOutWindows:
    """Held-out text, cut to measure memories on.

    Args:
        ids_NT: windows of tokens, one more than `context`, as the last predicts none.
        num_bytes: of the tokens that are scored.
        prompt: tokens of each window that are read in one go and not scored.
        asked_NT: the same windows with an early passage repeated at the end.
        asked: tokens of that passage, of which the first third only leads in.
    """

    ids_NT: Tensor
    num_bytes: int
    prompt: int
    asked_NT: Tensor
    asked: int

    @classmethod
    def cut(cls, split: Split, context: int, count: int, seed: int = 0) -> HeldOutWindows:
        """The first windows of a split; half of each is prompt.

        Raises:
            UserError: there is not one whole window.
        """
        windows = split.windows(context, False)
        count = min(count, len(windows))
        if context < LEAST:
            raise UserError(f"data.context: {context} tokens are too few to forget any; give {LEAST} or more")
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
        # From behind the first tokens, which many memories keep, to where the latest begin.
        begins = torch.randint(context // 8, prompt, (count,), generator=draw).tolist()
        passages = [ids_T[begin : begin + asked] for ids_T, begin in zip(ids_NT, begins, strict=True)]
        return cls(ids_NT, num_bytes, prompt, torch.cat([ids_NT[:, :context], torch.stack(passages)], dim=1), asked)


def held_out(loaded: Loaded, data: Mapping[str, Any], count: int) -> HeldOutWindows:
    """Windows of the text that was given, or of what a run held out of its own.

    Args:
        loaded: the model, whose tokenizer reads.
        data: ``text``, ``context`` and ``column``, as `pondera.evaluation.perplexity.evaluate` takes them.
        count: windows.

    Raises:
        UserError: no text, or one that is too short.
    """
    given = given_settings(dict(data))
    context = context_of(given.get("context"), loaded)
    limit = loaded.model.positions
    if limit is not None:
        context = min(context, limit - ASKED)  # the repeated passage comes behind
    if "text" in given:
        source = open_text(given["text"], given.get("column", "text"))
        text = LongText.read(source, given["text"], loaded.tokenizer, count * context, loaded.model.embedded)
        return HeldOutWindows.cut(text, context, count)
    if loaded.run is None:
        raise UserError("data.text: this model is not from a run; say what to measure it on, e.g. --data.text book.txt")
    return HeldOutWindows.cut(prepare(loaded.run.config.data).validation, context, count)


def calibration(loaded: Loaded, text: str | None, tokens: int, context: int) -> list[Tensor]:
    """Token ids ``[B, T]`` to fit codebooks to.

    Args:
        loaded: the model.
        text: a file, folder or dataset; none: what a run trained on, and nothing for other models.
        tokens: about so many in all.
        context: T.

    Raises:
        UserError: a text that does not fill one window.
    """
    if text is not None:
        split: Split = LongText.read(open_text(text), text, loaded.tokenizer, tokens, loaded.model.embedded)
    elif loaded.run is not None:
        split = prepare(loaded.run.config.data).train
    else:
        return []
    windows = split.windows(context, False)
    count = min(len(windows), max(1, tokens // context))
    if not count or not len(windows):
        raise UserError(
            f"--calibrate: this text has {split.num_tokens} tokens, and a window needs {context + 1}; give a longer one"
        )
    ids_NT = torch.stack([windows[number]["input_ids"] for number in range(count)])
    return list(ids_NT.split(max(1, TOGETHER // context)))

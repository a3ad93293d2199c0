"""A prompt that is edited and continued, with one KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from pondera.core.errors import UserError
from pondera.core.hf import CACHE, DynamicCache, PreTrainedModel
from pondera.inference.pie import PIE, Edit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEAMS = ("num_beams", "num_return_sequences")
"""Settings of `generate` with which the cache would contain several sequences."""


class EditablePrompt:
    """A prompt that is edited and continued: each edit computes its own tokens only, and the KV cache of the rest is re-used.

    `pondera.inference.pie.PIE` says what of the cache is exact after an edit and what is not.

    Args:
        model: see `PIE`.
        tokenizer: its tokenizer.
        text: the prompt.
        refresh: see `PIE`: tokens after each edit that are computed again.

    Attributes:
        text: the text after the latest edit.
        ids: its token ids.
        cache: the KV cache of all tokens but the last.

    Raises:
        UserError: see `PIE`; or the text has no tokens.

    Example::

        model, tokenizer = load("smollm2")
        prompt = EditablePrompt(model, tokenizer, open("module.py").read())
        print(prompt.generate(max_new_tokens=20))
        print(prompt.replace("timeout=10", "timeout=60"))  # Edit(unchanged=812, moved=1103, recomputed=9)
        print(prompt.generate(max_new_tokens=20))
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, refresh: int = 0) -> None:
        self.pie, self.tokenizer = PIE(model, refresh), tokenizer
        self.text, self.ids = "", []
        new_cache = getattr(model, "new_cache", None)
        self.cache = DynamicCache(config=model.config) if new_cache is None else new_cache()
        self.edit(text)

    def edit(self, text: str) -> Edit:
        """Makes this the text of the prompt; returns how many of its tokens were re-used and recomputed."""
        ids = cast("list[int]", self.tokenizer(text).input_ids)
        if not ids:
            raise UserError("text: no tokens; give at least one character")
        found = self.pie.edit(self.cache, self.ids, ids)
        self.text, self.ids = text, ids
        return found

    def replace(self, old: str, new: str) -> Edit:
        """Replaces a part of the text.

        Raises:
            UserError: the text does not contain `old` exactly once.
        """
        if (count := self.text.count(old) if old else 0) != 1:
            raise UserError(
                f"replace: the text contains {old!r} {count} times; give a part that occurs once, or use edit"
            )
        return self.edit(self.text.replace(old, new))

    def generate(self, **settings: Any) -> str:
        """The text that the model generates after the prompt, without special tokens; the prompt stays as it is.

        Args:
            settings: of ``model.generate``, such as ``max_new_tokens=20``; one sequence, no beams.

        Raises:
            UserError: a setting for several sequences.
        """
        for name in BEAMS:
            if settings.get(name, 1) != 1:
                raise UserError(f"{name}={settings[name]}: the cache contains one sequence; leave {name} out")
        model = cast(Any, self.pie.model)
        ids_1T = torch.tensor([self.ids], device=model.device)
        given = {"attention_mask": torch.ones_like(ids_1T), CACHE: self.cache, **dict.fromkeys(BEAMS, 1)}
        try:
            found = model.generate(ids_1T, **{**settings, **given})
        finally:
            self.cache.crop(min(0, len(self.ids) - 1 - self.cache.get_seq_length()))
        new_ids = getattr(found, "sequences", found)[0, len(self.ids) :]
        return cast(str, self.tokenizer.decode(new_ids, skip_special_tokens=True))

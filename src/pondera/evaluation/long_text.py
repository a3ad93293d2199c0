"""A text tokenised in memory, without a prepared corpus, for scoring or calibration.

Shapes: T tokens of a text, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pondera.core.errors import UserError
from pondera.data.corpus import Split
from pondera.data.row_files import reader
from pondera.data.text import Source
from pondera.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class LongText(Split):
    """A split that holds one text in memory, without an EOS token at its end."""

    def __init__(self, ids_T: np.ndarray, bytes_T: np.ndarray, starts_D: np.ndarray) -> None:
        self.ids, self._bytes, self._starts = (
            ids_T,
            np.append(0, bytes_T),
            starts_D,
        )  # bytes up to the end of each token
        self.num_tokens, self.num_bytes = len(ids_T), int(self._bytes[-1])

    def after(self, token: int) -> LongText:
        """The part of the text that starts at token `token`."""
        starts_D = np.append(0, self._starts[self._starts > token] - token)
        return LongText(self.ids[token:], self._bytes[token + 1 :], starts_D)

    @classmethod
    def read(
        cls,
        source: Source,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int | None,
        embedded: int | None = None,
    ) -> LongText:
        """Reads the tokens needed to predict `max_tokens` tokens.

        Args:
            source: the documents.
            name: the source as the user gave it, for messages.
            tokenizer: tokenises the text.
            max_tokens: number of tokens to predict (default: `None`, all).
            embedded: number of tokens that the model embeds; larger ids are refused.

        Raises:
            UserError: the text is too short, or it has a token that the model does not embed.
        """
        ids, ends, starts, tokens = [], [], [], 0
        for text in documents(source, name):
            (text_ids, text_ends), seen = next(encode([text], tokenizer, embedded)), ends[-1][-1] if ends else 0
            if tokens and tokenizer.eos_token_id is not None:
                ids.append(np.array([tokenizer.eos_token_id]))  # the end of the document before
                ends.append(np.array([seen]))
                tokens += 1
            ids.append(text_ids)
            ends.append(text_ends + seen)
            starts.append(tokens)
            tokens += len(text_ids)
            if max_tokens is not None and tokens > max_tokens:
                break
        stop = None if max_tokens is None else max_tokens + 1
        text = cls(np.concatenate(ids)[:stop], np.concatenate(ends)[:stop], np.array(starts)) if ids else None
        if text is None or text.num_tokens < 2 or not text.num_bytes_of(1, text.num_tokens):
            raise UserError(f"data.text: {name!r} is too short to score: it has no token after the first")
        return text


def documents(source: Source, name: str) -> Iterator[str]:
    """The documents of a source. A plain-text file counts as one document, although training splits it."""
    texts = (document.text for document in source.read())
    path = Path(name).expanduser()
    if path.is_file() and reader(path) is None:
        yield "".join(texts)
    else:
        yield from texts

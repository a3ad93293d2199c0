"""Tokenizers: training, loading, and encoding with the bytes of text per token."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from pondera.core.errors import UserError
from pondera.core.interruptible import LOOK, interruptible
from pondera.data.text import HUB_NAME, first_line, hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
LONGEST_WORD = 4096
"""Maximum characters per word in tokenizer training."""
ENDLESS_WORD = re.compile(
    "|".join(rf"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
"""Long runs of letters, digits, other characters or spaces, which a byte-level tokenizer treats as one word."""
MANY = 1_000_000
"""From this many characters on, encoding is slow enough to need handling of Ctrl-C."""

log = logging.getLogger(__name__)


def bpe_size(spec: str) -> int | None:
    """N of ``bpe-N``, or `None` if `spec` names a tokenizer.

    Example:
        >>> bpe_size("bpe-2048"), bpe_size("gpt2")
        (2048, None)
    """
    if not re.fullmatch(r"bpe[-_]?\d*", spec, re.IGNORECASE):
        return None
    digits = spec.removeprefix("bpe-")
    if not digits.isdigit() or not 257 <= int(digits) <= 65536:
        raise UserError(
            f"data.tokenizer: 'bpe-N' takes N from 257 (every byte, and EOS) to 65536, e.g. bpe-2048; got {spec!r}"
        )
    return int(digits)


def load_tokenizer(spec: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder or hub name; it must be fast (for token offsets) and have an EOS token."""
    folder = Path(spec).expanduser()
    if not folder.is_dir() and not HUB_NAME.fullmatch(spec):
        raise UserError(
            f"data.tokenizer: no such folder: {spec!r}; give one, or 'bpe-N' (such as bpe-2048) to train one"
        )
    from transformers import AutoTokenizer

    try:
        with hub():
            tokenizer = AutoTokenizer.from_pretrained(folder if folder.is_dir() else spec)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"data.tokenizer: {spec!r} is not 'bpe-N' (such as bpe-2048), "
            f"nor a folder or hub name that loads as a tokenizer ({first_line(error)})"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer: {spec!r} has no fast version (tokenizer.json), which is needed to count bytes"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer: {spec!r} has no EOS token, which is needed after every document; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `size` tokens (fewer if no more pairs exist); EOS has id 0.

    The time of training is quadratic in the length of a word. So words of more than `LONGEST_WORD` characters, such as a
    genome, are cut. All other text is used unchanged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )

    def train(stop: Event) -> None:
        pieces = (piece for text in texts for piece in _without_endless_words(text))
        backend.train_from_iterator(itertools.takewhile(lambda _: not stop.is_set(), pieces), trainer)

    interruptible(train, _tell_every_half_minute)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def _without_endless_words(text: str) -> Iterator[str]:
    start = 0
    for word in ENDLESS_WORD.finditer(text):
        stop = word.start() + LONGEST_WORD
        while stop < word.end():
            yield text[start:stop]
            start, stop = stop, stop + LONGEST_WORD
    yield text[start:]


def _tell_every_half_minute(seconds: float) -> None:
    if round(seconds / LOOK) % round(30 / LOOK) == 0:
        log.info("still training the tokenizer, after %.0f s", seconds)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer."""
    return hashlib.sha256(f"{tokenizer.eos_token}\n{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()


def check_ids(ids: Sequence[int] | np.ndarray, tokenizer: PreTrainedTokenizerFast, embedded: int) -> None:
    """Checks that a model has an embedding for all token ids.

    Args:
        ids: token ids.
        tokenizer: the tokenizer of the ids.
        embedded: number of token embeddings of the model.

    Raises:
        UserError: an id is too large; the message names the token.
    """
    largest = int(np.max(ids, initial=0))
    if largest >= embedded:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the text has the token {token!r} (id {largest}), but the model has embeddings for {embedded:,} tokens (ids 0 to "
            f"{embedded - 1}); remove it from the text, or use the tokenizer of the model"
        )


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, embedded: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids of each text without special tokens, and the cumulative UTF-8 bytes at the end of each token.

    Tokenizers can drop characters and split a character into several tokens. So a token is charged up to the end of its
    text, the ends never decrease, and the last token ends the text. The differences then always add up to the bytes of
    the text. A text without tokens gives two empty arrays.

    Args:
        texts: the texts.
        tokenizer: tokenizer of the model.
        embedded: number of token embeddings of the model; default: `None`, not checked.

    Raises:
        UserError: a text has a token without an embedding.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # a text that contains the EOS string must not end a document
    if sum(map(len, texts)) < MANY:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    else:
        encodings = interruptible(lambda _: backend.encode_batch(texts, add_special_tokens=False))
    for text, encoding in zip(texts, encodings, strict=True):
        ids = np.array(encoding.ids, np.int64)
        if embedded is not None:
            check_ids(ids, tokenizer, embedded)
        ends = np.fromiter((stop for _, stop in encoding.offsets), np.int64, len(ids))
        if len(ids):
            ends = np.maximum.accumulate(ends)
            ends[-1] = len(text)
            if not text.isascii():
                ends = bytes_before(text)[ends]
        yield ids, ends


def bytes_before(text: str) -> np.ndarray:
    """Cumulative UTF-8 bytes before each character of a text, and the total: (len(text) + 1,).

    Example:
        >>> bytes_before("aé日").tolist()
        [0, 1, 3, 6]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.append(0, np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)))

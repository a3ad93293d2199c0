"""Prepares training windows: splits text, tokenises it once and stores memory-mapped bins.

`prepare` writes a folder in the cache and opens it:

    manifest.json         sizes of the files below (the folder is rebuilt if they differ), dtypes, digest
    tokenizer/            loads with AutoTokenizer
    train/, validation/   ids.bin: all documents, each followed by the EOS token
                          bytes.bin: cumulative UTF-8 bytes before each token, and the total
                          starts.bin: each document's first token;  names.json: their names

Shapes: T tokens of a split, D documents, C context.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pondera.core.errors import UserError
from pondera.core.paths import cache_folder
from pondera.core.run_config import DataConfig
from pondera.data.split import divide
from pondera.data.task_corpus import TaskCorpus, TaskSplit, prepare_task
from pondera.data.text import Document, Source, open_text
from pondera.data.tokenizer import bpe_size, encode, fingerprint, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from torch import LongTensor
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # increase it whenever the bins of the same text change
TOKENIZER_BYTES = 20_000_000  # of training text for a BPE
BATCH_BYTES = 4_000_000  # of text per batch of the tokenizer
SPLITS = ("train", "validation")

log = logging.getLogger(__name__)


def prepare(config: DataConfig, cache_dir: Path | None = None) -> AnyCorpus:
    """Splits and tokenises the text of `config`, or opens the cached result; draws the windows of its task.

    Documents are held out by the sha256 of their names (see `divide`), so the split is the same on all machines. The cache
    key is the content (text, tokenizer, share, limit), not the path or date. Concurrent processes that prepare the same
    corpus wait for the first.

    Args:
        config: the ``data`` part of a run.
        cache_dir: folder of the corpora; default: ``$PONDERA_CACHE`` or ``~/.cache/pondera``.

    Raises:
        UserError: text or tokenizer cannot be read, or there is not enough text for this context.

    Example:
        >>> corpus = prepare(DataConfig(text="stdlib", tokenizer="bpe-512", max_bytes=300_000))
        >>> corpus.train.windows(context=128)[0]["input_ids"].shape
        torch.Size([128])
    """
    from filelock import FileLock

    if config.task is not None:
        return prepare_task(config, cache_dir)
    _check(config)
    size = bpe_size(config.tokenizer)
    tokenizer = None if size else load_tokenizer(config.tokenizer)
    source = open_text(config.text, config.column)
    spec = size if tokenizer is None else fingerprint(tokenizer)
    key = hashlib.sha256(json.dumps([FORMAT, source.digest, spec, config.validation, config.max_bytes]).encode())
    label = re.sub(r"[^a-zA-Z0-9.]+", "-", Path(config.text).name)[:40]
    cache = cache_folder(cache_dir)
    folder = cache / f"{label}-{key.hexdigest()[:16]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_intact(folder):
                _build(folder, source, config, tokenizer)
    except OSError as error:
        raise UserError(
            f"cannot write the prepared text to {str(cache)!r} ({error.strerror or error}); "
            "set PONDERA_CACHE to a writable folder with free space"
        ) from None
    corpus = Corpus(folder)
    _check_length(corpus, config.context)
    return corpus


class Corpus:
    """A prepared corpus on disk.

    Attributes:
        path: folder of the corpus.
        tokenizer_path: a folder that ``AutoTokenizer.from_pretrained`` loads.
        vocab_size: one more than the largest token id.
        train: the training documents.
        validation: the held-out documents.
        digest: sha256 of both splits' tokens and the vocabulary; equal digests mean equal data.
        skipped: number of skipped files, by reason.
    """

    def __init__(self, path: Path):
        manifest = json.loads((path / "manifest.json").read_text())
        self.path = path
        self.tokenizer_path = path / "tokenizer"
        self.vocab_size: int = manifest["vocab_size"]
        self.digest: str = manifest["digest"]
        self.skipped: dict[str, int] = manifest["skipped"]
        self.train, self.validation = (Split(path / name, *manifest["dtypes"]) for name in SPLITS)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the corpus."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_path)


class Split:
    """All documents of one split, concatenated, each followed by the EOS token.

    Attributes:
        ids: memory-mapped token ids, (T,).
        num_tokens: T, EOS tokens included.
        num_bytes: UTF-8 bytes of the text.
    """

    def __init__(self, folder: Path, ids_dtype: str, bytes_dtype: str):
        self._arguments = (folder, ids_dtype, bytes_dtype)
        self.ids = np.memmap(folder / "ids.bin", ids_dtype, mode="r")
        self._bytes = np.memmap(folder / "bytes.bin", bytes_dtype, mode="r")
        self._starts = np.memmap(folder / "starts.bin", "<u8", mode="r")
        self.num_tokens = len(self.ids)
        self.num_bytes = int(self._bytes[-1])
        self.num_documents = len(self._starts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Split, self._arguments  # a data-loading process maps the files itself instead of receiving their content

    def windows(self, context: int, document_mask: bool = False) -> Windows:
        """This split as windows of `context` tokens."""
        return Windows(self, context, document_mask)

    def num_bytes_of(self, start: int, stop: int) -> int:
        """UTF-8 bytes of the text of ``ids[start:stop]``.

        Exact for any range and additive over adjacent ranges. EOS tokens count 0 bytes; a character of several tokens counts
        for the first of them.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens}")
        return int(self._bytes[stop]) - int(self._bytes[start])

    def document_at(self, token_index: int) -> str:
        """The name of the document that token `token_index` belongs to."""
        if not 0 <= token_index < self.num_tokens:
            raise IndexError(f"token {token_index} of {self.num_tokens}")
        return self._names[int(self._documents_of(np.array(token_index)))]

    def _documents_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, positions, side="right") - 1

    @cached_property
    def _names(self) -> list[str]:
        return json.loads((self._arguments[0] / "names.json").read_text())


AnyCorpus = Corpus | TaskCorpus
AnySplit = Split | TaskSplit


class Windows:
    """A map-style dataset of consecutive, non-overlapping windows; an incomplete last window is dropped.

    Window i has ``input_ids = ids[i*C : i*C + C]`` and ``targets``, the next token of each. So every token of the split
    is predicted exactly once, except the first and those of the dropped window. The targets of window i have
    ``split.num_bytes_of(i*C + 1, i*C + C + 1)`` bytes.

    Args:
        split: the tokens.
        context: C, tokens per window.
        document_mask: add ``document_ids``, counted 1, 2, ... from the start of the window, to mask attention across
            documents.
    """

    def __init__(self, split: Split, context: int, document_mask: bool = False):
        self.split, self.context, self.document_mask = split, context, document_mask

    def __len__(self) -> int:
        return max(0, (self.split.num_tokens - 1) // self.context)

    def __getitem__(self, index: int) -> dict[str, LongTensor]:
        """``input_ids``, ``targets`` (and ``document_ids``) of shape (C,), and ``index``, a scalar; all int64."""
        import torch

        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context
        tokens = torch.from_numpy(self.split.ids[start : start + self.context + 1].astype(np.int64))
        window: dict[str, Any] = {"input_ids": tokens[:-1], "targets": tokens[1:], "index": torch.tensor(index)}
        if self.document_mask:
            documents_C = self.split._documents_of(np.arange(start, start + self.context))
            window["document_ids"] = torch.from_numpy(documents_C - documents_C[0] + 1)
        return window


def _check(config: DataConfig) -> None:
    if config.known_difficulty:
        raise UserError("data.known_difficulty: a text has none; set data.task, or leave known_difficulty out")
    if config.context < 1:
        raise UserError(f"data.context: a window needs at least 1 token, got {config.context}")
    if not 0 < config.validation < 1:
        raise UserError(
            f"data.validation: expected a share such as 0.05, more than 0 and less than 1; got {config.validation}"
        )
    if config.max_bytes is not None and config.max_bytes < 1:
        raise UserError(f"data.max_bytes: expected at least 1, or none for all text; got {config.max_bytes}")


def _check_length(corpus: Corpus, context: int) -> None:
    for split, name, windows in ((corpus.train, "training", 2), (corpus.validation, "held-out", 1)):
        needed = windows * context + 1
        if split.num_tokens < needed:
            fitting = min((corpus.train.num_tokens - 1) // 2, corpus.validation.num_tokens - 1)
            advice = f"use --data.context {fitting} or less, or more text" if fitting > 0 else "give more text"
            raise UserError(
                f"data.context: {windows} window{'s' * (windows > 1)} of {context} tokens and one more token need "
                f"{needed} {name} tokens, but there are {split.num_tokens}; {advice}"
            )


def _is_intact(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(folder: Path, source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Writes the corpus to a temporary folder and renames it when complete. The caller holds the lock."""
    train, validation, sizes_D = _divide(source, config)
    if tokenizer is None:
        log.info("training %s on %s", config.tokenizer, source.name)
        tokenizer = train_tokenizer(_sample(source, train, sizes_D), bpe_size(config.tokenizer) or 0)
    vocabulary = tokenizer.get_vocab()
    eos: Any = tokenizer.eos_token_id
    vocab_size = max(vocabulary.values()) + 1
    dtypes = ["<u2" if vocab_size <= 2**16 else "<u4", "<u4" if sizes_D.sum() < 2**32 else "<u8"]
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        tokenizer.save_pretrained(part / "tokenizer")
        log.info("tokenising %.1f MB of %s", sizes_D[train + validation].sum() / 1e6, source.name)
        writers = [_Writer(part / name, *dtypes) for name in SPLITS]
        writer_of = dict.fromkeys(train, writers[0]) | dict.fromkeys(validation, writers[1])
        chosen = ((writer_of[row], document) for row, document in enumerate(source.read()) if row in writer_of)
        for batch in _batches(chosen):
            encoded = encode([document.text for _, document in batch], tokenizer)
            for (writer, document), (ids, ends) in zip(batch, encoded, strict=True):
                if len(ids):
                    writer.add(document.name, np.append(ids, eos), np.append(ends, ends[-1]))
        digest = hashlib.sha256(json.dumps([tokenizer.eos_token, sorted(vocabulary.items())]).encode())
        for writer in writers:
            digest.update(writer.close())
        manifest = {
            "digest": digest.hexdigest(),
            "vocab_size": vocab_size,
            "dtypes": dtypes,
            "skipped": source.skips(),
            "files": {str(path.relative_to(part)): path.stat().st_size for path in part.rglob("*") if path.is_file()},
        }
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.info("%s is ready; skipped files: %s", source.name, source.skips() or "none")


def _divide(source: Source, config: DataConfig) -> tuple[list[int], list[int], np.ndarray]:
    """Indices of the training and held-out documents in the order of their hashes, and the bytes of all documents.

    Each split has at least one document.
    """
    names, sizes = [], []
    for document in source.read():
        names.append(document.name)
        sizes.append(len(document.text.encode()))
    if len(names) < 2:
        left_out = ", ".join(f"{count} {reason}" for reason, count in source.skips().items())
        found = f"one document of {sizes[0]:,} bytes" if sizes else "no text"
        raise UserError(
            f"data.text: {source.name!r} contains {found}{f' (skipped files: {left_out})' if left_out else ''}; "
            "give at least two documents, or one long text file: a part must be held out"
        )
    train, held_out = divide(names, sizes, config.validation)
    if config.max_bytes is not None:
        smallest = min(sizes[row] for row in train)
        train = _within(config.max_bytes, train, sizes)
        if not train:
            raise UserError(
                f"data.max_bytes: every training document has more than {config.max_bytes:,} bytes; "
                f"give at least {smallest:,}"
            )
    return train, held_out, np.array(sizes, np.int64)


def _within(limit: int, rows: list[int], sizes: list[int]) -> list[int]:
    """Greedily selects documents, in order, up to a total of `limit` bytes."""
    chosen = []
    for row in rows:
        if sizes[row] <= limit:
            chosen.append(row)
            limit -= sizes[row]
    return chosen


def _sample(source: Source, rows: list[int], sizes_D: np.ndarray) -> Iterator[str]:
    """Texts to train a tokenizer on: the first documents, up to about `TOKENIZER_BYTES`."""
    enough = int(np.searchsorted(np.cumsum(sizes_D[rows]), TOKENIZER_BYTES)) + 1
    chosen = set(rows[:enough])
    return (document.text for row, document in enumerate(source.read()) if row in chosen)


def _batches(documents: Iterable[tuple[_Writer, Document]]) -> Iterator[list[tuple[_Writer, Document]]]:
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class _Writer:
    """Writes documents to the bins of one split."""

    def __init__(self, folder: Path, ids_dtype: str, bytes_dtype: str):
        folder.mkdir()
        self.folder, self.ids_dtype, self.bytes_dtype = folder, ids_dtype, bytes_dtype
        self.ids, self.bytes, self.starts = (open(folder / f"{name}.bin", "wb") for name in ("ids", "bytes", "starts"))
        self.names: list[str] = []
        self.num_tokens = self.num_bytes = 0
        self.hash = hashlib.sha256()
        self.bytes.write(np.zeros(1, bytes_dtype).tobytes())

    def add(self, name: str, ids: np.ndarray, ends: np.ndarray) -> None:
        tokens = ids.astype(self.ids_dtype).tobytes()
        self.hash.update(tokens)
        self.ids.write(tokens)
        self.bytes.write((self.num_bytes + ends).astype(self.bytes_dtype).tobytes())
        self.starts.write(np.array(self.num_tokens, "<u8").tobytes())
        self.names.append(name)
        self.num_tokens += len(ids)
        self.num_bytes += int(ends[-1])

    def close(self) -> bytes:
        """Closes the files; returns the hash of the tokens."""
        for file in (self.ids, self.bytes, self.starts):
            file.close()
        (self.folder / "names.json").write_text(json.dumps(self.names))
        return self.hash.digest()

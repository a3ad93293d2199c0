"""Text files, with their sentences and passages as ranges of bytes.

Shapes: S sentences, P passages of one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pondera.core.errors import UserError
from pondera.inference.quotes.sentences import passages, sentences

LARGEST = 100_000_000
"""Bytes of a file at most."""


@dataclass(frozen=True)
class TextFile:
    """A file and its ranges.

    Args:
        path: absolute.
        content: the bytes.
        sentence_S2: first byte and end of each sentence; headings of Markdown are none.
        passage_P2: the same of each passage.
        passage_of_S: the passage of each sentence.
    """

    path: str
    content: bytes
    sentence_S2: np.ndarray
    passage_P2: np.ndarray
    passage_of_S: np.ndarray

    @property
    def sha256(self) -> str:
        """The hash of the content."""
        return hashlib.sha256(self.content).hexdigest()

    def text(self, start: int, end: int) -> str:
        """The text of a range of bytes."""
        return self.content[start:end].decode()


class Unsuitable(ValueError):
    """A file without text to quote; the message says why in a word or two."""


def read(path: Path) -> TextFile:
    """Reads a file of UTF-8 text and cuts it.

    Raises:
        Unsuitable: it is empty, not UTF-8 text, too large, or cannot be read.

    Example::

        file = read(Path("README.md"))
        [file.text(*place) for place in file.sentence_S2[:3]]
    """
    try:
        if path.stat().st_size > LARGEST:
            raise Unsuitable(f"larger than {LARGEST // 1_000_000} MB")
        content = path.read_bytes()
        text = content.decode()
    except UnicodeDecodeError:
        raise Unsuitable("not UTF-8 text") from None
    except OSError as error:
        raise Unsuitable(error.strerror or "cannot be read") from None
    if "\0" in text:
        raise Unsuitable("not UTF-8 text")
    found = sentences(text)
    if not found:
        raise Unsuitable("empty")
    of_S = np.array(passages(found))
    sentence_S2 = _byte_offsets(text)[np.array([place[:2] for place in found])]
    first_P = np.flatnonzero(np.diff(of_S, prepend=-1))
    last_P = np.append(first_P[1:], len(of_S)) - 1
    passage_P2 = np.stack([sentence_S2[first_P, 0], sentence_S2[last_P, 1]], axis=1)
    answers_S = np.array([not _is_heading(path, text, start) for start, _, _ in found])
    if not answers_S.any():
        raise Unsuitable("headings only")
    return TextFile(str(path), content, sentence_S2[answers_S], passage_P2, of_S[answers_S])


def collect(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The files of the given files and folders, without hidden ones, and the folders that have none.

    Returns:
        Absolute paths, sorted, each once; and the names of folders without files.

    Raises:
        UserError: a path does not exist.

    Example::

        files, without = collect(["docs/", "README.md"])
    """
    found: set[Path] = set()
    without = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inner = [
                file
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            found |= {file.resolve() for file in inner}
            without += [] if inner else [str(given)]
        elif path.is_file():
            found.add(path.resolve())
        else:
            raise UserError(f"no such file or folder: {str(given)!r}")
    return sorted(found), without


def _is_heading(path: Path, text: str, start: int) -> bool:
    """Whether a heading of Markdown begins here; it says what a passage is about, and answers nothing."""
    return path.suffix.lower() in (".md", ".markdown") and text[start] == "#"


def _byte_offsets(text: str) -> np.ndarray:
    """The byte at which each character of a text begins, and the end."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])

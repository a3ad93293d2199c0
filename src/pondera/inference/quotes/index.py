"""An index of text files: every sentence with its file and its bytes, found by meaning and by words.

Shapes: S sentences, D dimensions of the encoder.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pondera.core.errors import UserError
from pondera.core.run_folder import write_atomic
from pondera.inference.quotes.documents import TextFile, Unsuitable, collect, read
from pondera.inference.quotes.encoder import WORDS, Encoder
from pondera.inference.quotes.search_table import WORDS_WEIGHT, Place, SearchTable

FORMAT = 1
LIST, VECTORS = "index.json", "vectors.safetensors"
CHANGED = "it has changed"


@dataclass(frozen=True)
class Quote:
    """A sentence of a file, byte for byte.

    Args:
        text: the bytes `start` to `end` of `file`, as text.
        file: path of the file.
        start: first byte.
        end: the byte after the last one.
        score: how well it fits the question; comparable within one search only.
        also: other places of the same text.
    """

    text: str
    file: str
    start: int
    end: int
    score: float
    also: tuple[Place, ...] = ()


@dataclass
class _Entry:
    """A file with the vectors of its sentences; `None` without an encoder."""

    file: TextFile
    vectors_SD: np.ndarray | None


@dataclass
class SpanIndex:
    """The sentences of text files, with the vectors of an encoder.

    The score of a sentence is the cosine between its vector and that of the question, plus half of the words' score: BM25
    of the sentence, plus half of that of its passage. Both are standardised over all sentences before they are added. All
    sentences are compared, so nothing is missed.

    Cost: a search multiplies S vectors of D numbers, and reads nothing from disk. Loading reads all files again and compares
    their sha256, so a quote cannot come from a file that has changed.
    When not to use it: for more than some millions of sentences, which want an approximate index.

    Args:
        encoder: the encoder's name, or ``"words"``.
        words_weight: weight of words compared with meaning; it is not saved.

    Example::

        index = SpanIndex("minilm")
        index.add(["docs/"])
        index.save("my.index")
        SpanIndex.load("my.index").quotes("How is a file read?")[0]
    """

    encoder: str
    words_weight: float = WORDS_WEIGHT
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _changed: dict[str, str] = field(default_factory=dict)
    _made: SearchTable | None = None
    _loaded: Encoder | None = None

    def add(
        self, paths: Sequence[str | Path], done: Callable[[int, int], Any] = lambda *_: None
    ) -> tuple[list[str], dict[str, str]]:
        """Reads files and folders; files that are known and unchanged are not encoded again.

        Args:
            paths: files or folders; hidden files in folders are left out.
            done: called with the number of encoded texts and their total.

        Returns:
            The files that are new or changed, and those that were skipped, with the reason.

        Raises:
            UserError: a path does not exist, or there is no text at all.
        """
        files, without = collect(paths)
        skipped = dict.fromkeys(without, "no files in it")
        new: list[TextFile] = []
        for path in files:
            try:
                file = read(path)
            except Unsuitable as error:
                skipped[str(path)] = str(error)
                continue
            known = self._entries.get(file.path)
            if known is None or known.file.content != file.content:
                new.append(file)
        if not self._entries and not new:
            raise UserError(f"no text to index in {', '.join(map(repr, map(str, paths)))} ({_reasons(skipped)})")
        for entry in self._encoded(new, done):
            self._entries[entry.file.path] = entry
            self._changed.pop(entry.file.path, None)
        self._made = None
        return [file.path for file in new], skipped

    def drop(self, paths: Sequence[str | Path]) -> list[str]:
        """Removes files, and all files in the given folders.

        Raises:
            UserError: the index has no such file.
        """
        dropped: list[str] = []
        for given in paths:
            path = str(Path(given).expanduser().resolve())
            names = [*self._entries, *self._changed]
            found = [name for name in names if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not found:
                raise UserError(f"--drop: the index has no file {str(given)!r}; it has {_some(names)}")
            dropped += [name for name in found if name not in dropped]
        for name in dropped:
            self._entries.pop(name, None)
            self._changed.pop(name, None)
        self._made = None
        return dropped

    @property
    def files(self) -> list[TextFile]:
        """The files, sorted by path."""
        return [self._entries[path].file for path in sorted(self._entries)]

    def quotes(self, question: str, count: int = 1) -> list[Quote]:
        """The sentences that fit a question best, best first; equal texts are one quote with all their places.

        Args:
            question: any text with a letter or digit.
            count: number of quotes at most.

        Raises:
            UserError: an empty question or index, or `count` < 1.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Path(folder, "a.txt").write_text("Bread is baked. The sea is wide.")
            ...     index = SpanIndex("words")
            ...     _ = index.add([folder])
            >>> [(quote.text, quote.start, quote.end) for quote in index.quotes("How wide is the sea?")]
            [('The sea is wide.', 16, 32)]
        """
        if count < 1:
            raise UserError(f"--quotes {count}: give 1 or more")
        if not any(char.isalnum() for char in question):
            raise UserError("--prompt: give a question with at least one letter or digit")
        if not self._entries:
            raise UserError("the index is empty; add files with --add")
        search = self._search()
        score_S = search.scores(question, self._encode([question]))
        found: dict[str, Quote] = {}
        for row in np.argsort(-score_S, kind="stable"):
            text = search.texts[row]
            if text not in found:
                if len(found) == count:
                    break
                first, *others = search.places[text]
                found[text] = Quote(text, *first, score=float(score_S[row]), also=tuple(others))
        return list(found.values())

    def save(self, folder: str | Path) -> None:
        """Writes the index: the list of files with their hashes, and the vectors.

        Raises:
            UserError: the folder cannot be written, or files have changed since they were indexed.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        self._check(str(folder))
        entries = [self._entries[path] for path in sorted(self._entries)]
        listed = [{"path": entry.file.path, "sha256": entry.file.sha256} for entry in entries]
        tree = {"format": FORMAT, "encoder": self.encoder, "files": listed}
        vectors = {
            str(number): entry.vectors_SD for number, entry in enumerate(entries) if entry.vectors_SD is not None
        }
        part = folder.with_name(f".{folder.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_atomic(part / VECTORS, save(vectors))
            write_atomic(part / LIST, json.dumps(tree, indent=1))
            _replace(part, folder)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written ({error.strerror or error})") from None

    @classmethod
    def load(cls, folder: str | Path, changed: bool = False) -> SpanIndex:
        """Opens an index and reads its files.

        Args:
            folder: the folder of the index.
            changed: whether files may have changed or be gone, as before `add` and `drop`; `save` refuses those that are left.

        Raises:
            UserError: no index, a damaged one, or a file that has changed since or is gone.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder).expanduser()
        if not is_index(folder):
            raise UserError(f"{str(folder)!r} is not an index; make one with: pondera index docs/ --out {folder}")
        try:
            tree = json.loads((folder / LIST).read_text())
            vectors = load_file(folder / VECTORS)
            if tree["format"] != FORMAT:
                raise UserError(f"{str(folder)!r} was written by another version of Pondera; make the index again")
            index = cls(str(tree["encoder"]))
            listed = [(str(one["path"]), str(one["sha256"])) for one in tree["files"]]
            for number, (path, sha256) in enumerate(listed):
                file = _unchanged(path, sha256)
                if isinstance(file, TextFile):
                    index._entries[path] = _checked(_Entry(file, vectors.get(str(number))), index.encoder)
                else:
                    index._changed[path] = file
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{str(folder)!r} is damaged ({type(error).__name__}: {error}); make the index again"
            ) from None
        if not changed:
            index._check(str(folder))
        return index

    def _check(self, folder: str) -> None:
        """Refuses files that are not as they were indexed."""
        for path, reason in self._changed.items():
            index, file = shlex.quote(folder), shlex.quote(path)
            what = f"{reason} since {folder} was made" if reason == CHANGED else f"cannot be read now ({reason})"
            raise UserError(
                f"{path}: {what}, so nothing can be quoted from it; update the index: "
                f"pondera index --out {index} --add {file}, or --drop {file}"
            )

    def _encoded(self, files: list[TextFile], done: Callable[[int, int], Any]) -> list[_Entry]:
        """The files with the vectors of their sentences."""
        texts = [file.text(*place) for file in files for place in file.sentence_S2]
        vectors = self._encode(texts, lambda count: done(count, len(texts)))
        if vectors is None:
            return [_Entry(file, None) for file in files]
        ends = np.cumsum([len(file.sentence_S2) for file in files])
        return [_Entry(file, part) for file, part in zip(files, np.split(vectors, ends[:-1]), strict=True)]

    def _encode(self, texts: list[str], done: Callable[[int], Any] = lambda _: None) -> np.ndarray | None:
        if self.encoder == WORDS:
            return None
        self._loaded = self._loaded or Encoder(self.encoder)
        return self._loaded.encode(texts, done)

    def _search(self) -> SearchTable:
        if self._made is None:
            vectors = [self._entries[path].vectors_SD for path in sorted(self._entries)]
            self._made = SearchTable(self.files, vectors, self.words_weight)
        return self._made


def is_index(folder: str | Path) -> bool:
    """Whether a folder has an index."""
    return all((Path(folder) / name).is_file() for name in (LIST, VECTORS))


def _unchanged(path: str, sha256: str) -> TextFile | str:
    """The file as it was indexed, or why there is none."""
    try:
        file = read(Path(path))
    except Unsuitable as error:
        return str(error)
    return file if file.sha256 == sha256 else CHANGED


def _checked(entry: _Entry, encoder: str) -> _Entry:
    """The entry, if it has as many vectors as texts.

    Raises:
        ValueError: it has not.
    """
    found = None if entry.vectors_SD is None else len(entry.vectors_SD)
    wanted = None if encoder == WORDS else len(entry.file.sentence_S2)
    if found != wanted:
        raise ValueError(f"{entry.file.path} has {found} vectors of sentences, not {wanted}")
    return entry


def _replace(part: Path, folder: Path) -> None:
    """Moves a new folder to the place of an old one."""
    if not folder.exists():
        part.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _reasons(skipped: dict[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3]) or "nothing given"


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"

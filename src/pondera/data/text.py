"""Text sources: a file, a folder, the standard library of this Python, or a Hugging Face dataset.

`open_text` returns a `Source`: named documents that can be read repeatedly in the same order, one at a time, so that a
corpus need not fit in memory. Names do not include a path outside the source: they decide which documents are held out,
which must be the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import socket
import sysconfig
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pondera.core.errors import UserError, unknown
from pondera.data.packed_files import NotText, nearest, opened
from pondera.data.row_files import PACKED, READERS, Row, reader, without_surrogates

PIECE = 16_384  # characters per document of a single plain-text file
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NAMED = ("stdlib",)  # sources that are not files
TOPICS = "pydoc_data/topics.py"  # the language reference, as one large dictionary


class Document(NamedTuple):
    """One text and its name, which decides its split."""

    name: str
    text: str


@dataclass
class Source:
    """Documents in a fixed order.

    Attributes:
        name: name given by the user.
        digest: sha256 of contents and names; sources of equal digest have equal documents.
        read: returns a new iterator over the documents.
        skipped: skipped file -> reason (``"binary"``, ``"empty"``, ...); complete after all documents were read.
    """

    name: str
    digest: str
    read: Callable[[], Iterator[Document]]
    skipped: dict[str, str] = field(default_factory=dict)

    def skips(self) -> dict[str, int]:
        """Number of skipped files, by reason."""
        return dict(Counter(self.skipped.values()))


def open_text(text: str, column: str = "text") -> Source:
    """Opens the text source that ``data.text`` names.

    Args:
        text: ``"stdlib"``, a file, a folder, or the name of a Hugging Face dataset.
        column: the text field of a JSON, CSV, TSV or Parquet file or a dataset.

    Raises:
        UserError: no such source, or it cannot be read.

    Example:
        >>> open_text("stdlib").skips().get("binary", 0)
        0
    """
    if text == "stdlib":
        return _stdlib()
    path = Path(text).expanduser()
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _dataset(text, column)
    if path.is_dir():
        return _folder(path, text, column)
    if path.is_file():
        return _files(text, [(path.name, path)], column)
    if path.exists():
        raise UserError(f"data.text: {text!r} is neither a regular file nor a folder; save it to a file first")
    if not HUB_NAME.fullmatch(text) or path.suffix.lower() in (".txt", ".md", *READERS, *PACKED):
        raise UserError(f"data.text: no such file or folder: {text!r}{nearest(path, NAMED)}")
    return _dataset(text, column)


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """Cuts text into pieces of at most `size` characters, at the end of a paragraph if possible, else of a line
    or a word. The concatenated pieces equal the text.

    Example:
        >>> list(cut("one two\\n\\nthree", size=12))
        ['one two\\n\\n', 'three']
    """
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            ends = (text.rfind(mark, start + size // 2, stop) + len(mark) for mark in ("\n\n", "\n", " "))
            stop = next((end for end in ends if end > start + size // 2), stop)
        yield text[start:stop]
        start = stop


@contextmanager
def hub() -> Iterator[None]:
    """Enables offline mode of the hub client in the block if the host of the hub does not resolve; otherwise the client
    retries for a minute before it fails. Files in the cache of the hub still load."""
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        if not urllib.request.getproxies():  # a proxy resolves host names itself
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _stdlib() -> Source:
    """The standard library of the running Python: sources, documentation files and language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        (name, path)
        for name, path in _walk(root, {}, NOT_LIBRARY)
        if path.suffix in (".py", ".txt", ".rst", ".md")
        and not name.startswith(("config-", "_sysconfigdata"))  # depend on the build of this Python
    ]
    if not files:
        raise UserError(f"data.text: this Python has no library sources in {str(root)!r}; give a file or a folder")
    library = _files("stdlib", [item for item in files if item[0] != TOPICS], "text", whole=True)

    def read() -> Iterator[Document]:
        yield from library.read()
        if (root / TOPICS).is_file():
            for statement in ast.parse((root / TOPICS).read_text(encoding="utf-8")).body:
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                    for topic, text in sorted(ast.literal_eval(statement.value).items()):
                        yield Document(f"topics/{topic}", text)

    return Source("stdlib", _digest("stdlib", files), read, library.skipped)


def _folder(root: Path, name: str, column: str) -> Source:
    skipped: dict[str, str] = {}
    files = list(_walk(root, skipped))
    source = _files(name, files, column, whole=len(files) > 1)
    source.skipped.update(skipped)
    return source


def _walk(root: Path, skipped: dict[str, str], prune: Collection[str] = ()) -> list[tuple[str, Path]]:
    """All regular files below `root`, except hidden ones and folders in `prune`, sorted by relative POSIX path."""
    files = []
    for folder, folders, names in os.walk(root):
        for hidden in [name for name in folders + names if name.startswith(".")]:
            skipped[str(Path(folder, hidden))] = "hidden"
        folders[:] = [name for name in folders if not name.startswith(".") and name not in prune]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path.relative_to(root).as_posix(), path) for path in files if path.is_file())


def _files(name: str, files: list[tuple[str, Path]], column: str, whole: bool = False) -> Source:
    """A source of files. If `whole`, each plain text file is one document and other files are skipped. Otherwise plain text
    is cut into several documents, so that some can be held out, and a file that is not text is an error."""
    skipped: dict[str, str] = {}

    def read() -> Iterator[Document]:
        for relative, path in files:
            try:
                rows = reader(path)
                documents = _rows(relative, path, column, rows) if rows else _plain(relative, path, whole)
                for title, text in documents:
                    if text.strip():
                        yield Document(without_surrogates(title), without_surrogates(text))
            except NotText as error:
                if not whole:
                    raise
                skipped[str(path)] = error.reason

    return Source(name, _digest(f"{column}:{whole}", files), read, skipped)


def _digest(kind: str, files: Iterable[tuple[str, Path]]) -> str:
    """Hash of names and contents, not of dates, so that copies have the same digest."""
    total = hashlib.sha256(kind.encode())
    for relative, path in files:
        one = hashlib.sha256(relative.encode("utf-8", "surrogateescape"))
        try:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    one.update(chunk)
        except OSError:
            one.update(b"unreadable")  # reading it later raises
        total.update(one.digest())
    return total.hexdigest()


def _plain(relative: str, path: Path, whole: bool) -> Iterator[Document]:
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    if "\0" in text:
        raise NotText(path, "binary, or not UTF-8")
    if not text.strip():
        raise NotText(path, "empty")
    if whole:
        yield Document(relative, text)
    else:
        size = min(PIECE, max(1024, len(text) // 32))  # so that a small file has several pieces, too
        yield from (Document(f"{relative}#{number}", piece) for number, piece in enumerate(cut(text, size), 1))


def _rows(relative: str, path: Path, column: str, rows: Callable[..., Iterator[Row]]) -> Iterator[Document]:
    with opened(path) as file:
        for place, row in rows(file, relative, (column, "title")):
            if column not in row:
                raise unknown(f"data.column (the text field of {place})", column, row)
            if not isinstance(row[column], str):
                raise UserError(
                    f"data.column: field {column!r} of {place} has type {type(row[column]).__name__}, not text"
                )
            title = row.get("title")
            yield Document(title if isinstance(title, str) and title else place, row[column])


def _dataset(name: str, column: str) -> Source:
    """The rows of a Hugging Face dataset's ``train`` split, or of one saved with ``save_to_disk``."""
    import datasets

    path = Path(name).expanduser()
    try:
        with hub():
            saved = path.is_dir()
            loaded: Any = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name, split="train")
            rows: Any = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
    except ConnectionError:
        raise _no_dataset(
            name, "the Hugging Face hub cannot be reached, and the dataset is not in the local cache"
        ) from None
    except Exception as error:  # code and files of a dataset can raise anything
        raise _no_dataset(name, first_line(error)) from None
    if column not in rows.column_names:
        raise unknown(f"data.column (the text field of {name})", column, rows.column_names)

    def read() -> Iterator[Document]:
        row = 0
        for table in rows.with_format("arrow").iter(batch_size=1000):
            for text in table.column(column).to_pylist():
                row += 1
                if text is not None and not isinstance(text, str):
                    raise UserError(f"data.column: field {column!r} of {name} has type {type(text).__name__}, not text")
                if text and text.strip():
                    yield Document(f"{path.name}:{row}", text)

    digest = hashlib.sha256()
    for document in read():
        digest.update(hashlib.sha256(document.text.encode()).digest() + document.name.encode())
    return Source(name, digest.hexdigest(), read)


def first_line(error: Exception) -> str:
    """The first line of the message of an error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _no_dataset(name: str, reason: str) -> UserError:
    return UserError(
        f"data.text: {name!r} is not 'stdlib', not a file or folder, and not a Hugging Face dataset that loads "
        f"({reason}){nearest(Path(name), NAMED)}"
    )

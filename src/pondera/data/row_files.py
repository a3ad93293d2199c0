"""Readers for files with one text per row: JSON, JSON lines, CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PACKED = (".xz", ".gz")
LONGEST = 2**31 - 1  # characters of a CSV field; the default limit of the csv module is 131,072

Row = tuple[str, dict[str, Any]]
"""The place of a row, e.g. ``books.csv:3``, and its fields."""


class NoRows(ValueError):
    """A file without rows despite its extension."""


class BadRows(ValueError):
    """A row that cannot be read; the message names its place."""


def reader(path: Path) -> Callable[[IO[bytes], str, tuple[str, ...]], Iterator[Row]] | None:
    """The row reader for the extension of a file, or `None` for plain text.

    Case and a second extension ``.xz`` or ``.gz`` are ignored.

    Example:
        >>> [reader(Path(name)) is None for name in ("book.txt", "books.JSONL", "books.csv.gz", "books.parquet")]
        [True, False, False, False]
    """
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return READERS.get(inner.suffix.lower())


def _json_lines(file: IO[bytes], place: str, columns: tuple[str, ...]) -> Iterator[Row]:
    number = 0
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig")
        if text.strip():
            yield _object(f"{place}:{number}", _parsed(f"{place}:{number}", text), columns)
    if not number:
        raise NoRows("empty")


def _json(file: IO[bytes], place: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """Reads a list of objects, one object, or JSON lines, which many datasets name ``.json``."""
    content = file.read()
    text = content.decode("utf-8-sig")
    if not text.strip():
        raise NoRows("empty")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines):
            yield from _json_lines(io.BytesIO(content), place, columns)
            return
        raise BadRows(f"{place}: not valid JSON ({error})") from None
    if isinstance(found, dict) and columns[0] in found:
        found = [found]
    if not isinstance(found, list):
        raise NoRows(f"JSON, but neither a list of rows nor an object with the field {columns[0]!r}")
    for number, row in enumerate(found, 1):
        yield _object(f"{place}:{number}", row, columns)


def _parsed(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRows(f"{place}: not valid JSON ({error}); each line must be one object") from None


def _object(place: str, row: Any, columns: tuple[str, ...]) -> Row:
    if not isinstance(row, dict):
        example = json.dumps({columns[0]: "..."})
        raise BadRows(f"{place}: expected an object such as {example}, found {json.dumps(row)[:40]!r}")
    return place, row


def _csv(file: IO[bytes], place: str, columns: tuple[str, ...], delimiter: str = ",") -> Iterator[Row]:
    """Reads rows under a header. A row with another number of fields raises, because its text may be incomplete."""
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = _fields(csv.reader(lines, delimiter=delimiter, strict=True), place)
    header = next(rows, None)
    if header is None:
        raise NoRows("empty")
    for number, fields in enumerate(rows, 1):
        if fields and len(fields) != len(header):
            raise BadRows(
                f"{place}:{number}: {len(fields)} fields under a header of {len(header)}; quote texts that "
                f"contain {delimiter!r} or a line break with double quotes"
            )
        if fields:
            yield f"{place}:{number}", dict(zip(header, fields, strict=True))


def _fields(rows: Iterator[list[str]], place: str) -> Iterator[list[str]]:
    """Reads rows with fields of any length; the process-wide limit of the csv module is restored after each row."""
    while True:
        before = csv.field_size_limit(LONGEST)
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadRows(f"{place}: not valid CSV ({error})") from None
        finally:
            csv.field_size_limit(before)
        yield row


def _tsv(file: IO[bytes], place: str, columns: tuple[str, ...]) -> Iterator[Row]:
    yield from _csv(file, place, columns, "\t")


def _parquet(file: IO[bytes], place: str, columns: tuple[str, ...]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadRows(f"{place}: reading .parquet needs pyarrow; type: pip install pyarrow") from None
    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        # Without the first column all are read, so that the message about it can name them.
        wanted = [name for name in columns if name in names] if columns[0] in names else None
        batches = table.iter_batches(batch_size=1000, columns=wanted)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            if row.get(columns[0], "") is not None:  # as in datasets, null is no text
                yield f"{place}:{number}", row
    except ArrowException as error:
        raise NoRows(f"not a Parquet file, or damaged: {str(error).splitlines()[0]}") from None
    if not table.metadata.num_rows:
        raise NoRows("empty")


READERS: dict[str, Callable[[IO[bytes], str, tuple[str, ...]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON allows and UTF-8 does not.

    Example:
        >>> without_surrogates("a\\ud800b")
        'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")

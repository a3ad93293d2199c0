"""Rows of a file with one or several texts each, such as minimal pairs: which columns they are in, and which rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pondera.core.errors import UserError, unknown
from pondera.data.packed_files import nearest, opened
from pondera.data.row_files import READERS, Row, reader, without_surrogates


class TextRow(NamedTuple):
    """The texts of one row.

    Args:
        place: the file and the number of the row, for messages.
        texts: one for each column.
        group: the value of the group column; `None` without one.
    """

    place: str
    texts: tuple[str, ...]
    group: str | None = None


class TextRows(NamedTuple):
    """Rows of a file, in the order of the file.

    Args:
        rows: at least one.
        columns: the names of the columns of the texts.
        group: the name of the group column; `None` without one.
    """

    rows: list[TextRow]
    columns: tuple[str, ...]
    group: str | None = None


def read_text_rows(
    file: str | Path,
    setting: str,
    known: Sequence[tuple[str, ...]],
    columns: Sequence[str] | None = None,
    group: str | None = None,
    known_groups: Sequence[str] = (),
) -> TextRows:
    """Reads texts from a file with rows (JSON lines, JSON, CSV, TSV or Parquet), compressed or not.

    Args:
        file: the file.
        setting: the option that names the file, for messages.
        known: column names to look for in the first row if none are given; the first that are all there are used.
        columns: the names of the columns, as many as those of `known` (default: `None`, look for the known ones).
        group: the column to group rows by (default: `None`, the first of `known_groups` in the first row, if any).
        known_groups: names of group columns.

    Raises:
        UserError: there is no such file, it has no rows, or a row lacks a column, or has something else than text in it.

    Example::

        read_text_rows("pairs.jsonl", "--pairs", [("good", "bad")]).rows[0].texts  # ("The cat is here.", "The cat are here.")
    """
    number = len(known[0])
    if columns is not None and len(columns) != number:
        raise UserError(
            f"--columns: {setting} needs {_count(number)}, such as {','.join(known[0])}; got {len(columns)}"
        )
    path = Path(file).expanduser()
    wanted = (*(columns or known[0]), *(known_groups if group is None else [group]))
    rows = _read(path, str(file), setting, wanted)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{setting}: {str(file)!r} has no rows; give a file with {_count(number)} of text")
    place, fields = first
    used = tuple(columns) if columns is not None else next((each for each in known if set(each) <= set(fields)), None)
    if used is None:
        asked = " or ".join(",".join(each) for each in known)
        raise UserError(
            f"{setting}: {place} has no columns {asked}, but {', '.join(fields)}; name yours with --columns"
        )
    group = group if group is not None else next((name for name in known_groups if name in fields), None)
    found = [_row(place, fields, used, group) for place, fields in [first, *rows]]
    return TextRows(found, used, group)


def _read(path: Path, name: str, setting: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """All rows of a file."""
    if not path.is_file():
        what = "is not a file" if path.exists() else f"does not exist{nearest(path)}"
        raise UserError(f"{setting}: {name!r} {what}; give a file with rows ({', '.join(READERS)})")
    rows = reader(path)
    if rows is None:
        raise UserError(
            f"{setting}: {name!r} is not a file with rows; give one of {', '.join(READERS)}, also as .xz or .gz"
        )
    with opened(path, setting) as file:
        yield from rows(file, path.name, columns)


def _row(place: str, fields: dict[str, Any], columns: tuple[str, ...], group: str | None) -> TextRow:
    for name in (*columns, *([] if group is None else [group])):
        if name not in fields:
            raise unknown(f"column (of {place})", name, fields)
    for name in columns:
        if not isinstance(fields[name], str):
            raise UserError(f"--columns: field {name!r} of {place} has type {type(fields[name]).__name__}, not text")
    texts = tuple(without_surrogates(fields[name]) for name in columns)
    return TextRow(place, texts, None if group is None else str(fields[group]))


def _count(number: int) -> str:
    return "one column" if number == 1 else f"{number} columns"

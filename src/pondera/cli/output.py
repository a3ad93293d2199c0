"""What verbs print."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Sends what a job prints to stderr, so that stdout carries nothing but JSON."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints strict JSON: NaN and infinity, which it does not have, become null."""
    print(json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None), indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table as wide as the terminal; the first column is text, the others align to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # Piped into a file, a table is as wide as it needs to be.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)

"""What verbs print."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
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


def print_comparison(found: dict[str, Any]) -> None:
    """Prints what `pondera.comparison.compare.compare` returned: the table, how to read it, and the verdict."""
    from pondera.report.page import COLUMNS

    rows = found["rows"]
    columns = [column for column in COLUMNS if any(row[column[0]]["mean"] is not None for row in rows)]
    print_table(
        ["recipe", *(label for _, label, _ in columns)],
        [[row["name"], *(_cell(row[key], show) for key, _, show in columns)] for row in rows],
    )
    over = f"mean ± standard deviation over {found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    print(f"{over}, at equal training {'FLOPs' if found['equal'] == 'flops' else found['equal']}\n")
    print("\n".join(found["verdict"]))


def _cell(value: dict[str, Any], show: Callable[[float], str]) -> str:
    """The mean of a measure over the seeds, with its spread where there is one."""
    if value["mean"] is None:
        return "–"
    return show(value["mean"]) + (f" ± {show(value['spread'])}" if value["spread"] else "")

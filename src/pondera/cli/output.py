"""Output of the verbs: tables and JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Redirects stdout to stderr if `wanted`, so that stdout has JSON only."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints strict JSON; NaN and infinity become null."""
    print(json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None), indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table in the width of the terminal; all columns but the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # Without a terminal the width is fixed.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def print_comparison(found: dict[str, Any]) -> None:
    """Prints the result of `pondera.comparison.compare.compare`: the table, a legend and the significance statements."""
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
    """The mean over seeds, with the standard deviation if it is not zero."""
    if value["mean"] is None:
        return "–"
    return show(value["mean"]) + (f" ± {show(value['spread'])}" if value["spread"] else "")

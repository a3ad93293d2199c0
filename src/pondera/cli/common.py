"""Small things that several verbs share."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pondera.ground import settings, spec
from pondera.ground.errors import UserError
from pondera.ground.run import is_run
from pondera.ground.settings import RunConfig


def load_config(source: str, overrides: dict[str, Any]) -> RunConfig:
    """A checked config whose methods exist: everything that can be refused before anything heavy is imported."""
    config = settings.load(source, overrides)
    for seam in spec.SEAMS:
        text = getattr(config, seam)
        if text is not None:
            try:
                spec.find(spec.parse(text).name, seam)
            except UserError as error:
                raise UserError(f"{seam}: {error}") from None
    return config


def check_model_path(path: str) -> None:
    """Refuses what can be neither a run folder nor a model folder.

    Raises:
        UserError: no such folder, or it holds neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{path!r} {what}; give a run folder that `pondera train` wrote, or a model folder")
    if not is_run(folder) and not (folder / "config.json").is_file():
        raise UserError(
            f"{path!r} holds neither a run (config.yaml, env.json) nor a model (config.json); give a run folder that "
            "`pondera train` wrote, or a model folder"
        )


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

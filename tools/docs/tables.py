"""Building blocks of generated parts: results files, tables, means with standard deviation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tools.docs.names import with_current_names

ROOT = Path(__file__).parents[2]
MAKERS: dict[str, Callable[[str], str]] = {}
"""The functions that generate parts, by the name used in a page."""


def generated(maker: Callable[[str], str]) -> Callable[[str], str]:
    """Registers a function that generates a part of a page from the path of a results file; its name must be free."""
    assert maker.__name__ not in MAKERS, f"two parts of pages are named {maker.__name__}"
    MAKERS[maker.__name__] = maker
    return maker


def read(path: str) -> dict[str, Any]:
    """A result file, by its path from the root of the repository, with today's class names."""
    return with_current_names(json.loads((ROOT / path).read_text()))


def table(head: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:" for _ in head[1:]]], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_spread(value: dict[str, Any], sign: str = "") -> str:
    """``mean ± spread``."""
    mean = f"{value['mean']:{sign}.3f}"
    return mean if value["spread"] is None else f"{mean} ± {value['spread']:.3f}"


def over_seeds(values: Sequence[float | None], show: Callable[[float], str] = "{:.3f}".format) -> str:
    """``mean ± standard deviation`` of the known values; empty if there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    return show(mean(found)) + (f" ± {show(stdev(found))}" if len(found) > 1 else "")

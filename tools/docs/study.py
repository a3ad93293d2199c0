"""Tables and figures of the quantizer experiments: codebook collapse, and reconstruction error at equal bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from pondera.methods.quantize.common.diagnosis import judge
from pondera.report.figure import figure
from pondera.report.svg import Bars, bar_chart
from tools.docs.tables import ROOT, generated, over_seeds, read, table

COLLAPSE = "results/collapse.json"
FIGURES = ROOT / "docs" / "figures"
TIMES = ("quantized from the first step", "after a warm-up")
DRAWN: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "error_coded": ("Reconstruction error", "squared error as a share of the variance, held-out", "{:.3f}".format),
    "effective_rank_input": (
        "Effective rank",
        "effective rank of the vectors to quantize, of 16, held-out",
        "{:.1f}".format,
    ),
}
"""The figures for every kind of vectors: title, label and number format."""

Row = dict[str, Any]


@generated
def collapse(path: str) -> str:
    """Every setting on every kind of vectors: codebook health and reconstruction error."""
    found = read(path)
    head = ["setting", "usage", "perplexity", "rank, codes", "rank, vectors", "crowding", "split error"]
    parts = []
    for data, settings in _by(found["rows"], "data"):
        labelled = any("purity" in row for rows in settings.values() for row in rows)
        lines = [
            (
                name,
                _mean(rows, "usage", "{:.0%}".format),
                _mean(rows, "perplexity", "{:.1f}".format),
                _mean(rows, "effective_rank_codes", "{:.1f}".format),
                _mean(rows, "effective_rank_input", "{:.1f}".format),
                _mean(rows, "crowding", "{:.0%}".format),
                _mean(rows, "split_error"),
                _mean(rows, "error_coded"),
                *([_mean(rows, "purity", "{:.2f}".format)] if labelled else []),
            )
            for name, rows in settings.items()
        ]
        named = [*head, "reconstruction", *(["purity"] if labelled else [])]
        parts.append(f"**{data.capitalize()}**\n\n{table(named, lines)}")
    return "\n\n".join(parts) + _source(found)


@generated
def verdicts(path: str) -> str:
    """The verdict of `pondera probe collapse` on every setting, with its measures."""
    found = read(path)
    lines = []
    for data, settings in _by(found["rows"], "data"):
        best = min(mean(row["error_coded"] for row in rows) for rows in settings.values())
        for name, rows in settings.items():
            diagnosed = [row for row in rows if "diagnosis" in row]
            if not diagnosed:
                continue
            numbers = [row["diagnosis"] for row in diagnosed]
            lines.append(
                (
                    f"{data}: {name}",
                    f"{mean(row['error_coded'] for row in diagnosed) / best:.1f} ×",
                    _mean(numbers, "perplexity", "{:.0f}".format),
                    _mean(numbers, "reachable_perplexity", "{:.0f}".format),
                    _mean(numbers, "split_error"),
                    _mean(numbers, "reachable_error"),
                    _mean(numbers, "effective_rank_input", "{:.1f}".format),
                    ", ".join(dict.fromkeys(verdict(row) for row in diagnosed)),
                )
            )
    head = [
        "setting",
        "error relative to best",
        "perplexity",
        "of k-means",
        "split error",
        "of k-means",
        "rank, vectors",
    ]
    head.append("verdict")
    return table(head, lines)


def verdict(row: Row) -> str:
    """The verdict on one trained autoencoder, from the quantized vectors alone."""
    return judge(row["diagnosis"], row["diagnosis"]["width"])


@generated
def quantizers(path: str) -> str:
    """Reconstruction error at equal bits, by kind of vectors."""
    found = read(path)
    kinds = list(dict.fromkeys(row["data"] for row in found["rows"]))
    lines = []
    for name, of_kind in _by(found["rows"], "setting", "data"):
        errors = [_mean(of_kind.get(kind, []), "error_coded") for kind in kinds]
        lines.append((f"`{name}`", str(next(iter(of_kind.values()))[0]["bits"] or "none"), *errors))
    return table(["quantizer", "bits", *kinds], lines) + _source(found)


def figures() -> dict[Path, str]:
    """The figures of the collapse study, for every kind of vectors."""
    if not (ROOT / COLLAPSE).is_file():
        return {}
    return {
        FIGURES / f"collapse-{data}-{key.replace('_', '-')}.svg": drawn(settings, key, data)
        for data, settings in _by(read(COLLAPSE)["rows"], "data")
        for key in DRAWN
    }


def drawn(settings: dict[str, list[Row]], key: str, data: str) -> str:
    """A bar chart by initialisation, with quantization from the first step and after a warm-up."""
    bars = [Bars(name, number, {}) for number, name in enumerate(TIMES)]
    for name, rows in settings.items():
        bars[rows[0]["warmup"] > 0].values[_form(name)] = mean(row[key] for row in rows)
    title, label, show = DRAWN[key]
    return figure(bar_chart(f"{title}: {data}", label, bars, show), TIMES)


def _form(name: str) -> str:
    """The name of a setting without the start of quantization."""
    form = re.sub(r"^warm-up, (then )?| at step 0$", "", name)
    return "random, std 1" if form == "random" else form


def _by(rows: Iterable[Row], key: str, then: str = "setting") -> list[tuple[str, dict[str, list[Row]]]]:
    """Rows grouped by two of their keys, in order of appearance."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row[key], {}).setdefault(row[then], []).append(row)
    return list(groups.items())


def _mean(rows: Iterable[Row], key: str, show: Callable[[float], str] = "{:.3f}".format) -> str:
    """Mean and spread of one number."""
    return over_seeds([row.get(key) for row in rows], show)


def _source(found: dict[str, Any]) -> str:
    seeds = len({row["seed"] for row in found["rows"]})
    return f"\n\n`{found['command']}`: {seeds} seeds, mean ± standard deviation."

"""The experiment on state tracking: its tables, and accuracy and passes by difficulty as figures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from pondera.report.figure import figure
from pondera.report.svg import Series, line_chart
from tools.docs.study import FIGURES
from tools.docs.tables import ROOT, generated, over_seeds, read, table

RESULTS = "results/tracking/s3-resets-cpu"
GROUPS = ("fixed", "deciding")
MOST = 12
"""The highest difficulty in a figure; few tokens have more."""
ACCURACY = ("plain", "doubledepth", "latentcot", "latentcot-3", "universal-3", "ponderlm2")
PASSES = ("latentcot-known", "adaptivelatentcot", "universaltransformer", "ponderlm3", "adaponderlm")


@generated
def tracking(path: str) -> str:
    """A comparison on a task: costs relative to the first row, accuracy, passes and what they depend on."""
    found = read(path)
    first, rows = found["rows"][0], []
    rates = found.get("sweep", {}).get("chosen", {})
    for row in found["rows"]:
        correlation = over_seeds(row["passes_correlation"]["values"], "{:.2f}".format)
        rows.append(
            (
                f"`{row['name']}`",
                f"{row['parameters']['mean'] / 1e3:.0f} k",
                f"{_ratio(row, first, 'inference_flops_per_token')} ×",
                f"{_ratio(row, first, 'train_flops')} ×",
                over_seeds(row["passes_per_token"]["values"], "{:.2f}".format).replace(" ± 0.00", ""),
                correlation,
                over_seeds(row["accuracy"]["values"]),
                over_seeds(row.get("permuted_accuracy", {}).get("values", [])),
                f"{rates[row['name']]:g}" if row["name"] in rates else "",
            )
        )
    head = [
        *("model", "parameters", "inference FLOPs", "training FLOPs", "passes per token", "passes ~ difficulty"),
        *("accuracy", "accuracy, passes permuted", "learning rate"),
    ]
    used = [number for number in range(len(head)) if any(row[number] for row in rows)]
    head, rows = [head[number] for number in used], [tuple(row[number] for number in used) for row in rows]
    said = "\n".join(f"- {sentence}" for sentence in found["verdict"])
    source = f"`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."
    return f"{table(head, rows)}\n\n{said}\n\n{source}"


@generated
def by_difficulty(path: str) -> str:
    """Accuracy of each model at each difficulty, and its passes if they differ, as means over seeds."""
    rows = read(path)["rows"]
    every = {row["name"]: {measure: dict(curve(row, measure)) for measure in ("accuracy", "passes")} for row in rows}
    shown = sorted({level for curves in every.values() for level in curves["accuracy"]})
    lines = []
    for name, curves in every.items():
        for measure, levels in curves.items():
            if measure == "accuracy" or len(set(levels.values())) > 1:
                cells = (f"{levels[level]:.2f}" if level in levels else "" for level in shown)
                lines.append((f"`{name}`, {measure}", *cells))
    return table(["difficulty", *map(str, shown)], lines)


@generated
def gained(folder: str) -> str:
    """What each rule keeps of the gain of its deepest fixed form, and of that form's extra passes."""
    fixed, deciding = ({row["name"]: row for row in read(f"{folder}/{group}.json")["rows"]} for group in GROUPS)
    plain, rows = fixed["plain"]["accuracy"]["mean"], []
    for name, deepest in (("adaptivelatentcot", "latentcot-3"), ("universaltransformer", "universal-3")):
        gain, most = (
            [row[key]["mean"] - least for row in (deciding[name], fixed[deepest])]
            for key, least in (("accuracy", plain), ("passes_per_token", 1.0))
        )
        follows = over_seeds(deciding[name]["passes_correlation"]["values"], "{:.2f}".format)
        rows.append((f"`{name}`", f"`{deepest}`", f"{gain[0] / gain[1]:.0%}", f"{most[0] / most[1]:.0%}", follows))
    head = [
        "rule",
        "deepest fixed form",
        "share of its gain over plain",
        "share of its extra passes",
        "passes ~ difficulty",
    ]
    return table(head, rows)


def figures() -> dict[Path, str]:
    """Accuracy by difficulty of the models of fixed depth, and passes by difficulty of those that decide."""
    drawn = {}
    for group, names, measure, title, label in (
        ("fixed", ACCURACY, "accuracy", "Accuracy by the serial steps that a token needs", "accuracy"),
        ("deciding", PASSES, "passes", "Passes by the serial steps that a token needs", "passes per token"),
    ):
        if (ROOT / RESULTS / f"{group}.json").is_file():
            rows = {row["name"]: row for row in read(f"{RESULTS}/{group}.json")["rows"]}
            chart = line_chart(title, "serial steps", label, _series(rows, names, measure), cut=0.0)
            drawn[FIGURES / f"tracking-{measure}.svg"] = figure(chart, names)
    return drawn


def _series(rows: dict[str, Any], names: tuple[str, ...], measure: str) -> list[Series]:
    return [
        Series(name, number, [], [(float(level), value) for level, value in curve(rows[name], measure)])
        for number, name in enumerate(names)
    ]


def curve(row: dict[str, Any], measure: str) -> list[tuple[int, float]]:
    """A measure at each difficulty, as mean over the seeds that have tokens of it."""
    found: dict[int, list[float]] = {}
    for run in row["by_difficulty"]:
        for level, value in zip(run["difficulty"], run[measure], strict=True):
            found.setdefault(level, []).append(value)
    return [(level, fmean(values)) for level, values in sorted(found.items()) if level <= MOST]


def _ratio(row: dict[str, Any], first: dict[str, Any], key: str) -> str:
    return f"{row[key]['mean'] / first[key]['mean']:.2f}"

"""The rows of a comparison: measures of each variant over its seeds, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pondera.comparison.verdict import differences, verdict
from pondera.core.metric import score_name
from pondera.core.run_folder import Run

MEASURES = (
    "bits_per_byte",
    "error",
    "accuracy",
    "loss",
    "perplexity",
    "passes_per_token",
    "passes_correlation",
    "permuted_error",
    "permuted_accuracy",
    "permuted_bits_per_byte",
    "inference_flops_per_token",
    "kv_bytes_per_token",
    "train_flops",
    "train_tokens",
    "train_seconds",
    "train_tokens_per_second",
    "parameters",
)
OLD_NAMES = {"train_tokens_per_second": "tokens_per_second"}
"""The names of measures in runs of earlier versions."""


def summarise(
    names: Iterable[str], folders: Iterable[Path], controls: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The rows of a comparison, with means, spreads and differences to the baseline, and its verdict as sentences.

    Args:
        names: the variants, baseline first.
        folders: finished run folders.
        controls: for each random control the name of its variant (default: `None`, there is no control).
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for folder in folders:
        run = Run.open(folder)
        runs[run.config.name].append(run)
    baseline, key = next(iter(runs)), score_name([run.result() or {} for members in runs.values() for run in members])
    rows = [_row(name, members, runs[baseline], key) for name, members in runs.items()]
    for row in rows:
        if controls and row["name"] in controls:
            row["control_of"] = controls[row["name"]]
    return {
        "baseline": baseline,
        "score": key,
        "rows": rows,
        "verdict": verdict(rows, key),
        "comparisons": len(differences(rows)),
    }


def _row(name: str, members: list[Run], baseline: list[Run], key: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "seeds": [run.config.train.seed for run in members],
        "runs": [f"{run.path.parent.name}/{run.path.name}" for run in members],
        "steps": members[0].config.train.steps,
    }
    results = [run.result() or {} for run in members]
    for measure in MEASURES:
        old = OLD_NAMES.get(measure, measure)
        row[measure] = spread([result.get(measure, result.get(old)) for result in results])
    base = _scores(baseline, key)
    row[f"{key}_against_baseline"] = spread([score - base[seed] for seed, score in _scores(members, key).items()])
    if key == "error":
        row["by_difficulty"] = [result["by_difficulty"] for result in results]
    return row


def _scores(runs: list[Run], key: str) -> dict[int, float]:
    """The score `key` by seed."""
    return {run.config.train.seed: (run.result() or {})[key] for run in runs}


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (`None` for a single value) and the values."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "spread": None, "values": values}
    return {
        "mean": statistics.fmean(known),
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": values,
    }

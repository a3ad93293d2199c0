"""The rows of a comparison: measures of each variant over its seeds, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pondera.core.metric import SCORES, score_name
from pondera.core.run_folder import Run
from pondera.evaluation import significance

MEASURES = (
    "bits_per_byte",
    "error",
    "accuracy",
    "loss",
    "perplexity",
    "passes_per_token",
    "passes_correlation",
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


def summarise(names: Iterable[str], folders: list[Path]) -> dict[str, Any]:
    """The rows of a comparison, with means, spreads and differences to the baseline, and its verdict as sentences.

    Args:
        names: the variants, baseline first.
        folders: finished run folders.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for folder in folders:
        run = Run.open(folder)
        runs[run.config.name].append(run)
    baseline, key = next(iter(runs)), score_name([run.result() or {} for members in runs.values() for run in members])
    rows = [_row(name, members, runs[baseline], key) for name, members in runs.items()]
    gaps = [significance.gap(_scores(runs[name], key), _scores(runs[baseline], key)) for name in runs]
    verdict = [
        significance.sentence(name, baseline, difference, SCORES[key])
        for name, difference in zip(runs, gaps, strict=True)
    ]
    return {
        "baseline": baseline,
        "score": key,
        "rows": rows,
        "verdict": verdict[1:] + _at_equal_inference(rows, runs, key),
    }


def _at_equal_inference(rows: list[dict[str, Any]], runs: dict[str, list[Run]], key: str) -> list[str]:
    """Compares variants of about equal inference FLOPs with the first of them, unless that is the baseline."""
    verdict, leaders = [], rows[:1]
    for row in rows[1:]:
        cost = row["inference_flops_per_token"]["mean"]
        leader = next(
            (first for first in leaders if _about_equal(first["inference_flops_per_token"]["mean"], cost)), None
        )
        if leader is None:
            leaders.append(row)
        elif leader is not rows[0]:
            difference = significance.gap(_scores(runs[row["name"]], key), _scores(runs[leader["name"]], key))
            sentence = significance.sentence(row["name"], leader["name"], difference, SCORES[key])
            verdict.append(f"At about equal inference FLOPs, {sentence}")
    return verdict


def _about_equal(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and max(one, other) <= 1.15 * min(one, other)


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

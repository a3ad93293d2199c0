"""What reports read: run folders, grouped by name into variants, and their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pondera.core.errors import UserError
from pondera.core.format import Point, human
from pondera.core.metric import SCORES, score_name
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.evaluation.halting_stats import HALTING_STATS
from pondera.report.svg import Series

Anything = TypeVar("Anything")

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bits_per_byte", "bits/byte", "{:.4f}".format),
    ("error", "error rate", "{:.4f}".format),
    ("passes_correlation", "passes ~ difficulty", "{:.2f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("passes_per_token", "passes/token", "{:.2f}".format),
    ("inference_flops_per_token", "inference FLOPs/token", human),
    ("kv_bytes_per_token", "KV bytes/token", human),
    ("train_flops", "training FLOPs", human),
    ("train_tokens_per_second", "training tokens/s", human),
    ("parameters", "parameters", human),
)


@dataclass
class RunView:
    """The contents of one run folder, and its problems."""

    run: Run
    where: str
    config: RunConfig
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    traces: dict[str, dict[str, Any]]
    depths: dict[str, Any]
    problems: list[str]

    def points(self, measure: Measure, x_key: str) -> dict[int, Point]:
        """The curve of a measure by step."""
        read = ((line.get("step"), line.get(x_key), measure.read(line)) for line in self.metrics)
        return {step: (x, y) for step, x, y in read if step is not None and x is not None and y is not None}


@dataclass
class Variant:
    """All runs with the same name."""

    name: str
    index: int
    runs: list[RunView] = field(default_factory=list)

    @property
    def finished(self) -> list[RunView]:
        return [run for run in self.runs if run.result]

    def values(self, key: str) -> list[float]:
        """One number of the result, for each finished run that has it."""
        numbers = (run.result.get(key) for run in self.finished)
        return [float(value) for value in numbers if isinstance(value, (int, float))]

    def scores(self, key: str) -> dict[int, float]:
        """One number of the result by seed; the mean if several runs have the same seed."""
        by_seed: dict[int, list[float]] = {}
        for run in self.finished:
            if isinstance(value := run.result.get(key), (int, float)):
                by_seed.setdefault(run.config.train.seed, []).append(float(value))
        return {seed: statistics.fmean(values) for seed, values in by_seed.items()}

    def curve(self, measure: Measure, x_key: str) -> Series:
        """The curves of the runs, and their mean over the steps common to all finished runs (or to all runs)."""
        curves = [run.points(measure, x_key) for run in self.runs]
        whole = [curve for run, curve in zip(self.runs, curves, strict=True) if run.result and curve]
        counted = whole or [curve for curve in curves if curve]
        steps = sorted(set.intersection(*(set(curve) for curve in counted))) if counted else []
        mean = [middle_of([curve[step] for curve in counted]) for step in steps]
        lines = [list(curve.values()) for curve in curves]
        return Series(self.name, self.index, lines, mean, unfinished=not self.finished)


@dataclass(frozen=True)
class Measure:
    """The y axis of a curve: its label, and how to read it from a line of metrics."""

    label: str
    read: Callable[[dict[str, Any]], float | None]


VALIDATED = tuple(
    Measure(f"validation {label}", lambda line, name=name: (line.get("validation") or {}).get(name))
    for name, label in SCORES.items()
)
TRAINING_LOSS = Measure("training loss", lambda line: line.get("loss"))


def view_run(path: str | Path, name: str | None = None) -> RunView:
    """Reads a run folder; missing or damaged files are listed as problems and raise no error.

    Args:
        path: the run folder.
        name: the name to show (default: `None`, the path).
    """
    run = Run.open(path)
    problems: list[str] = []

    def attempt(read: Callable[[], Anything], otherwise: Anything) -> Anything:
        try:
            return read()
        except UserError as error:
            problems.append(str(error))
            return otherwise

    config = attempt(lambda: run.config, RunConfig(name=run.path.name))
    metrics = attempt(run.metrics, [])
    result = attempt(run.result, None) or {}
    for key in [key for key, _, _ in COLUMNS if not isinstance(result.get(key), (int, float, type(None)))]:
        problems.append(f"result.json: {key} is not a number")
        del result[key]
    if not metrics:
        problems.append("no metrics (metrics.jsonl is missing or empty)")
    if not result:
        last = max((line.get("step") or 0 for line in metrics), default=0)
        problems.append(f"not finished: no result, last logged step {last} of {config.train.steps}")
    traces = attempt(run.traces, {})
    depths = traces.pop(HALTING_STATS, {})
    return RunView(
        run, name or str(run.path), config, attempt(lambda: run.env, {}), metrics, result, traces, depths, problems
    )


def group_variants(runs: Iterable[RunView]) -> list[Variant]:
    """Groups runs by name, in the order in which the names first appear."""
    variants: dict[str, Variant] = {}
    for run in runs:
        variants.setdefault(run.config.name, Variant(run.config.name, len(variants))).runs.append(run)
    return list(variants.values())


def score_key(variants: Iterable[Variant]) -> str:
    """The score by which the finished runs are compared."""
    return score_name([run.result for variant in variants for run in variant.finished])


def measure_of(variants: Iterable[Variant]) -> Measure:
    """The best measure that all validated runs have; the training loss if there was no validation yet."""
    runs = [run for variant in variants for run in variant.runs]
    validated = [run for run in runs if any(run.points(measure, "step") for measure in VALIDATED)]
    if not validated:
        return TRAINING_LOSS
    return next(measure for measure in VALIDATED if all(run.points(measure, "step") for run in validated))


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN without values."""
    return statistics.fmean(values) if values else math.nan


def spread_of(values: Sequence[float]) -> float | None:
    """The sample standard deviation; `None` for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def middle_of(points: Sequence[Point]) -> Point:
    """The point of mean x and mean y."""
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)

"""Minimal pairs and last words for the trained runs of a comparison, with intervals over seeds."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.publishing import write_json
from pondera.core.run_folder import Run
from pondera.evaluation.last_word import score_last_words
from pondera.evaluation.minimal_pairs import score_pairs
from pondera.evaluation.significance import gap

BASES = ("plain", "doubledepth")
"""The variants that all others are compared with, if they were trained."""


@dataclass(frozen=True)
class Task:
    """A file of rows and how it is scored.

    Args:
        score: the function that scores a run on a file.
        measures: the scores that are compared between variants; those that a file does not give are left out.
        described: the entries of its result that do not depend on the model.
    """

    score: Callable[..., dict[str, Any]]
    measures: tuple[str, ...]
    described: tuple[str, ...]


TASKS = {
    "pairs": Task(score_pairs, ("accuracy", "macro_accuracy"), ("rows", "group")),
    "last_word": Task(score_last_words, ("accuracy", "log_probability_per_byte", "nats_per_word"), ("rows", "context")),
}


def evaluate_tasks(
    rows: Sequence[Mapping[str, Any]], out: Path, files: Mapping[str, Path], max_rows: int | None = None
) -> dict[str, Any]:
    """Scores all runs of a comparison on the tasks; scores of earlier calls are reused if run and file are the same.

    Args:
        rows: the ``rows`` of a comparison, with ``name``, ``seeds`` and ``runs``.
        out: the folder of the comparison, where scores are kept.
        files: the file of each task, by its name in `TASKS`.
        max_rows: rows per file (default: `None`, all).

    Returns:
        For each task: ``file`` and its ``sha256``, what `Task.described` names, the number of ``comparisons`` of each measure,
        and ``arms``: for each variant its measures, see `compared`.
    """
    found: dict[str, Any] = {}
    for name, file in files.items():
        task, digest = TASKS[name], hashlib.sha256(file.read_bytes()).hexdigest()
        scores = {
            row["name"]: {
                seed: _kept(task, out / run, out / "tasks" / f"{Path(run).name}-{name}.json", file, digest, max_rows)
                for seed, run in zip(row["seeds"], row["runs"], strict=True)
            }
            for row in rows
        }
        first = next(iter(next(iter(scores.values())).values()))
        described = {key: first[key] for key in task.described if key in first}
        measures = [measure for measure in task.measures if measure in first]
        found[name] = {"file": file.name, "sha256": digest, **described, **compared(scores, measures)}
    return found


def _kept(task: Task, run: Path, kept: Path, file: Path, digest: str, max_rows: int | None) -> dict[str, Any]:
    """The score of a run on a file, read from `kept` if it is of this run and file."""
    result = hashlib.sha256(Run(run).result_file.read_bytes()).hexdigest()
    key = {"file": digest, "run": result, "max_rows": max_rows}
    if kept.is_file() and (old := json.loads(kept.read_text()))["key"] == key:
        return old["score"]
    score = task.score(run, file, max_rows=max_rows)
    write_json(kept, {"key": key, "score": score})
    return score


def compared(scores: Mapping[str, Mapping[int, dict[str, Any]]], measures: Sequence[str]) -> dict[str, Any]:
    """The measures of each variant over its seeds, and its differences to the variants of `BASES`, paired over seeds.

    Args:
        scores: for each variant and seed, the result of its run.
        measures: the measures to compare.

    Returns:
        ``arms``: for each variant and measure ``by_seed``, their ``mean``, and ``against`` each base: the ``difference`` of the
        means, its 95 % interval as ``margin`` (`None` for one seed), ``significant`` after correction for ``comparisons``
        (Bonferroni), and how it was compared. With groups also the mean accuracy of each, as ``groups``.
    """
    bases = [base for base in BASES if base in scores]
    # Plain and doubledepth differ once: that pair is reported at doubledepth only.
    pairs = [(arm, base) for arm in scores for base in bases if arm != base and (arm, base) != BASES]
    arms: dict[str, dict[str, Any]] = {}
    for arm, runs in scores.items():
        arms[arm] = {}
        for measure in measures:
            mine = {seed: one[measure] for seed, one in runs.items()}
            against = {}
            for base in [base for other, base in pairs if other == arm]:
                found = gap(mine, {seed: one[measure] for seed, one in scores[base].items()}, len(pairs))
                against[base] = {"difference": found.mean, "margin": found.margin, "significant": found.clear}
                against[base] |= {"how": found.how, "seeds": found.seeds}
            mean = statistics.fmean(mine.values())
            arms[arm][measure] = {
                "by_seed": {str(seed): value for seed, value in mine.items()},
                "mean": mean,
                "against": against,
            }
        groups = [one["groups"] for one in runs.values() if "groups" in one]
        if groups:
            arms[arm]["groups"] = {
                name: statistics.fmean(each[name]["accuracy"] for each in groups) for name in groups[0]
            }
    return {"comparisons": len(pairs), "arms": arms}

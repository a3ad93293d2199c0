"""The demo: four small models learn to track a state, and one of them decides how long it thinks about each token."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera.comparison.compare import compare
from pondera.inference.answers import Answer, answers
from pondera.inference.load import load

RECIPES = ["plain", "doubledepth", "ponderlm2", "adaptivelatentcot"]
SETTINGS = {"data.task": "StateTracking(group='S3', reset=0.25)"}
SHOWN = 3
"""Held-out windows whose answers are shown."""


@dataclass
class Demo:
    """The results of the demo.

    Args:
        comparison: the result of `pondera.comparison.compare.compare`.
        windows: held-out windows, answered by the model that decides its passes.
        report: the path of the HTML report.
        thinking_run: the run folder of that model.
    """

    comparison: dict[str, Any]
    windows: list[list[Answer]]
    report: Path
    thinking_run: Path


def demo(out: Path, progress: bool = True, settings: dict[str, Any] | None = None) -> Demo:
    """Trains the four models on state tracking with resets, compares them, and answers some held-out windows.

    The number of serial steps that a token needs is the number of elements since the last reset, so the demo can show
    whether a model thinks longer where it has to.

    Args:
        out: the folder for runs, results and report; finished runs in it are reused.
        progress: show progress.
        settings: further dotted settings of all models.
    """
    jobs = min(2, os.cpu_count() or 1)
    overrides = SETTINGS | (settings or {})
    comparison = compare(RECIPES, 1, out=out, overrides=overrides, progress=progress, jobs=jobs, controls=False)
    thinking_run = out / comparison["rows"][-1]["runs"][0]
    return Demo(comparison, _answered(thinking_run), out / "report.html", thinking_run)


def _answered(run: Path) -> list[list[Answer]]:
    """The answers of a run to its first held-out windows."""
    from pondera.data.task_corpus import prepare_task

    loaded = load(run)
    assert loaded.run is not None
    data = loaded.run.config.data
    windows = prepare_task(data).validation.windows(data.context)
    return [answers(loaded, str(loaded.tokenizer.decode(windows[index]["input_ids"]))) for index in range(SHOWN)]

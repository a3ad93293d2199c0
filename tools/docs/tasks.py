"""Tables of the experiments on tasks: accuracy on each task, and accuracy at lengths beyond the training."""

from __future__ import annotations

from typing import Any

from experiments.tasks.run import RECIPES, TASKS
from pondera.core import spec
from pondera.evaluation.significance import gap
from tools.docs.tables import ROOT, generated, over_seeds, read, table
from tools.docs.tracking import curve

PAIRS = (("doubledepth", "plain"), ("ponderlm2", "doubledepth"))
"""The differences in the table of all tasks."""
LEVELS = (0, 2, 4, 6, 8, 10, 12)
"""The difficulties in the table of lengths."""


@generated
def on_tasks(folder: str) -> str:
    """Accuracy of each model on each task that was run, with two differences paired by seed."""
    rows = []
    for name, settings in TASKS.items():
        path = f"{folder}/{name}-cpu/models.json"
        if (ROOT / path).is_file():
            found = {row["name"]: row for row in read(path)["rows"]}
            accuracies = [over_seeds(found[recipe]["accuracy"]["values"]) for recipe in RECIPES]
            chance = 1 / spec.build(settings["data.task"], "task").answers
            passes = over_seeds(found[RECIPES[-1]]["passes_per_token"]["values"], "{:.2f}".format)
            gains = [_gain(found[one], found[other]) for one, other in PAIRS]
            rows.append((f"`{settings['data.task']}`", f"{chance:.3f}", *accuracies, passes, *gains))
    head = ["task", "a guess", *(f"`{recipe}`" for recipe in RECIPES), f"passes of `{RECIPES[-1]}`"]
    head += [f"`{one}` - `{other}`" for one, other in PAIRS]
    return (
        f"{table(head, rows)}\n\nAccuracy, mean ± standard deviation; differences with their 95 % CI, paired by seed."
    )


def _gain(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The accuracy of a row minus that of another, with its interval; * if zero is outside."""
    scores, others = (dict(zip(one["seeds"], one["accuracy"]["values"], strict=True)) for one in (row, other))
    found = gap(scores, others)
    margin = "" if found.margin is None else f" ± {found.margin:.3f}"
    return f"{found.mean:+.3f}{margin}{' *' if found.clear else ''}"


@generated
def lengths(path: str) -> str:
    """Accuracy of each model at each length: of all positions, of those beyond the training, and at some difficulties."""
    found, rows = read(path), []
    for row in found["rows"]:
        at = dict(curve(row, "accuracy"))
        rows.append(
            (
                f"`{row['name']}`",
                str(row["length"]),
                over_seeds(row["passes_per_token"]["values"], "{:.2f}".format).replace(" ± 0.00", ""),
                over_seeds(row["accuracy"]["values"]),
                over_seeds(row["accuracy_beyond"]["values"]),
                *(f"{at[level]:.2f}" if level in at else "" for level in LEVELS),
            )
        )
    head = ["model", "length", "passes per token", "accuracy", "accuracy beyond the training length"]
    source = f"`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."
    return f"{table([*head, *(f'difficulty {level}' for level in LEVELS)], rows)}\n\n{source}"

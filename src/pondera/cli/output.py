"""Output of the verbs: tables and JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pondera.inference.answers import Answer

MOST_LEVELS = 10
"""The highest difficulty in a table; reports and JSON have all."""


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Redirects stdout to stderr if `wanted`, so that stdout has JSON only."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints strict JSON; NaN and infinity become null."""
    print(json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None), indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table in the width of the terminal; all columns but the first are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # Without a terminal the width is fixed.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def print_comparison(found: dict[str, Any]) -> None:
    """Prints the result of `pondera.comparison.compare.compare`: the table, a legend and the significance statements."""
    from pondera.evaluation.significance import looked_at
    from pondera.report.page import COLUMNS

    if "sweep" in found:
        print_sweep(found["sweep"])
    rows = found["rows"]
    columns = [column for column in COLUMNS if any(row[column[0]]["mean"] is not None for row in rows)]
    print_table(
        ["recipe", *(label for _, label, _ in columns)],
        [[row["name"], *(_cell(row[key], show) for key, _, show in columns)] for row in rows],
    )
    if difficulties := {row["name"]: row["by_difficulty"] for row in rows if "by_difficulty" in row}:
        print_difficulty(difficulties)
    over = f"mean ± standard deviation over {found['seeds']} seeds" if found["seeds"] > 1 else "one seed"
    print(f"{over}, at equal training {'FLOPs' if found['equal'] == 'flops' else found['equal']}\n")
    print("\n".join(found["verdict"]))
    if found["seeds"] > 1 and found["comparisons"] > 1:
        print(looked_at(found["comparisons"]))


def print_sweep(found: dict[str, Any]) -> None:
    """Prints the scores of a sweep, with the chosen value of each recipe, and its notes.

    Args:
        found: the ``sweep`` entry of a comparison.
    """
    from pondera.core.metric import SCORES

    values, chosen = found["values"], found["chosen"]
    rows = [
        [
            name,
            *(f"{score:.4f}{'*' if value == chosen[name] else ' '}" for value, score in zip(values, of, strict=True)),
        ]
        for name, of in found["scores"].items()
    ]
    print_table([found["setting"], *map(str, values)], rows)
    seeds = f"seed{'s' if len(found['seeds']) > 1 else ''} {', '.join(map(str, found['seeds']))}"
    print(f"{SCORES[found['score']]} at {seeds}, which is not compared; * = chosen")
    print("".join(f"{note}\n" for note in found["notes"]))


def print_difficulty(found: dict[str, list[dict[str, Any]]]) -> None:
    """Prints accuracy and passes by difficulty, as means over runs.

    Args:
        found: for each name, what `pondera.evaluation.task_score.TaskSums.scores` gives as ``by_difficulty`` for each run.
    """
    levels = sorted({level for runs in found.values() for one in runs for level in one["difficulty"]})
    shown = [level for level in levels if level <= MOST_LEVELS]
    lines = []
    for name, runs in found.items():
        measures = ["accuracy", "passes"] if any(max(one["passes"]) > 1 for one in runs) else ["accuracy"]
        for measure in measures:
            by_level = [dict(zip(one["difficulty"], one[measure], strict=True)) for one in runs]
            means = [[values[level] for values in by_level if level in values] for level in shown]
            lines.append([name, measure, *(f"{fmean(values):.2f}" if values else "" for values in means)])
    print_table(["recipe", "difficulty", *map(str, shown)], lines)


def print_lengths(found: dict[str, Any]) -> None:
    """Prints a row for each length: accuracy, the accuracy beyond the training length, passes, and accuracy by difficulty.

    Args:
        found: what `pondera.evaluation.lengths.evaluate_lengths` returns.
    """
    levels = sorted({level for row in found["lengths"] for level in row["by_difficulty"]["difficulty"]})
    shown = [level for level in levels if level <= MOST_LEVELS]
    lines = []
    for row in found["lengths"]:
        table, beyond = row["by_difficulty"], row["accuracy_beyond"]
        by_level = dict(zip(table["difficulty"], table["accuracy"], strict=True))
        lines.append(
            [
                str(row["length"]),
                f"{row['accuracy']:.4f}",
                "–" if beyond is None else f"{beyond:.4f}",
                f"{row['passes_per_token']:.3f}",
                *(f"{by_level[level]:.2f}" if level in by_level else "" for level in shown),
            ]
        )
    columns = ["length", "accuracy", f"beyond {found['trained']}", "passes/token", *(f"at {level}" for level in shown)]
    print_table(columns, lines, f"{found['name']} on {found['task']}")
    print(f'trained at {found["trained"]} tokens; "beyond": the positions after them; "at N": accuracy at difficulty N')


def print_answers(found: Sequence[Answer]) -> None:
    """Prints a line each for the tokens of a task, the predictions, the errors and the passes."""
    lines = {
        "token": [one.symbol for one in found],
        "answer": [one.predicted or "" for one in found],
        "": ["" if one.predicted == one.correct else "wrong" for one in found],
        "passes": [str(one.passes) for one in found],
    }
    widths = [max(map(len, column)) for column in zip(*lines.values(), strict=True)]
    for name, cells in lines.items():
        if not any(cells):
            continue
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"  {name:8}{' '.join(padded)}".rstrip())
    asked = [one for one in found if one.correct is not None]
    right = sum(one.predicted == one.correct for one in asked)
    print(f"\n  {right} of {len(asked)} right, {fmean(one.passes for one in found):.2f} passes per token")


def _cell(value: dict[str, Any], show: Callable[[float], str]) -> str:
    """The mean over seeds, with the standard deviation if it is not zero."""
    if value["mean"] is None:
        return "–"
    return show(value["mean"]) + (f" ± {show(value['spread'])}" if value["spread"] else "")

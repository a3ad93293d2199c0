"""The verdict of a comparison: its differences as sentences, from the rows of ``results.json``.

Each variant is compared with the baseline, with the first variant of about equal inference FLOPs, and with its random
control.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pondera.core.metric import SCORES
from pondera.evaluation import significance

Row = dict[str, Any]


@dataclass(frozen=True)
class RowDifference:
    """Two rows whose scores are compared.

    Args:
        row: the row of a variant.
        other: the row that it is compared with.
        at: a condition at the start of the sentence.
        which: a relative clause about the other variant.
    """

    row: Row
    other: Row
    at: str = ""
    which: str = ""


def verdict(rows: list[Row], score: str) -> list[str]:
    """The differences of a comparison as sentences.

    Args:
        rows: the rows of the variants, baseline first.
        score: the key of the score by which they are compared.
    """
    said = []
    for found in differences(rows):
        gap = significance.gap(_scores(found.row, score), _scores(found.other, score))
        names = found.row["name"], found.other["name"] + found.which
        said.append(found.at + significance.sentence(*names, gap, SCORES[score]))
    return said


def differences(rows: list[Row]) -> list[RowDifference]:
    """The pairs of rows that the verdict compares, in the order of its sentences."""
    recipes = [row for row in rows if "control_of" not in row]
    named = {row["name"]: row for row in recipes}
    controls = [(named[row["control_of"]], row) for row in rows if "control_of" in row]
    return [
        *(RowDifference(row, rows[0]) for row in recipes[1:]),
        *_at_equal_inference(recipes),
        *(
            RowDifference(row, control, which=", which gives the same passes to random tokens")
            for row, control in controls
        ),
    ]


def _at_equal_inference(rows: list[Row]) -> list[RowDifference]:
    """Pairs each variant with the first of about equal inference FLOPs, unless that is the baseline."""
    found, leaders = [], rows[:1]
    for row in rows[1:]:
        leader = next((first for first in leaders if _about_equal(_cost(first), _cost(row))), None)
        if leader is None:
            leaders.append(row)
        elif leader is not rows[0]:
            found.append(RowDifference(row, leader, at="At about equal inference FLOPs, "))
    return found


def _cost(row: Row) -> float | None:
    return row["inference_flops_per_token"]["mean"]


def _about_equal(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and max(one, other) <= 1.15 * min(one, other)


def _scores(row: Row, score: str) -> dict[int, float]:
    """The score by seed."""
    return dict(zip(row["seeds"], row[score]["values"], strict=True))

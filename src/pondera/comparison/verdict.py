"""The verdict of a comparison: its differences as sentences, from the rows of ``results.json``.

Each variant is compared with the baseline, with the first variant of about equal inference FLOPs, and with its random
control. Significance is corrected for the number of these differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pondera.core.metric import SCORES
from pondera.evaluation import significance

Row = dict[str, Any]

ABOUT_EQUAL = 1.15
"""The largest ratio of inference FLOPs that counts as about equal."""


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
    said, all_of_them = [], differences(rows)
    for found in all_of_them:
        gap = significance.gap(_scores(found.row, score), _scores(found.other, score), len(all_of_them))
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
        *(RowDifference(row, control, which=_random(row, control)) for row, control in controls),
    ]


def _at_equal_inference(rows: list[Row]) -> list[RowDifference]:
    """Pairs each variant with the first of about equal inference FLOPs, unless that is the baseline."""
    found, leaders = [], rows[:1]
    for row in rows[1:]:
        ratios = [(leader, _ratio(row, leader)) for leader in leaders]
        near = [(leader, ratio) for leader, ratio in ratios if ratio and 1 / ABOUT_EQUAL <= ratio <= ABOUT_EQUAL]
        if not near:
            leaders.append(row)
            continue
        leader, ratio = near[0]
        if leader is not rows[0]:
            found.append(RowDifference(row, leader, at=_at(ratio)))
    return found


def _random(row: Row, control: Row) -> str:
    """The relative clause about a random control; it has numbers if the passes differ by more than 1 %."""
    own, passes = (one["passes_per_token"]["mean"] for one in (row, control))
    if abs(passes - own) <= 0.01 * own:
        return ", which gives the same passes to random tokens"
    return f", which gives {passes:.2f} instead of {own:.2f} passes per token to random tokens"


def _ratio(row: Row, other: Row) -> float | None:
    """The inference FLOPs of a variant relative to those of another one; `None` if they are not known."""
    costs = [one["inference_flops_per_token"]["mean"] for one in (row, other)]
    return costs[0] / costs[1] if None not in costs else None


def _at(ratio: float) -> str:
    """The start of a sentence about two variants of about equal inference FLOPs.

    Example:
        >>> _at(1.06), _at(0.999)
        ('At 1.06 × the inference FLOPs, ', 'At equal inference FLOPs, ')
    """
    written = f"{ratio:.2f}"
    return "At equal inference FLOPs, " if written == "1.00" else f"At {written} × the inference FLOPs, "


def _scores(row: Row, score: str) -> dict[int, float]:
    """The score by seed."""
    return dict(zip(row["seeds"], row[score]["values"], strict=True))

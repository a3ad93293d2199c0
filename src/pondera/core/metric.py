"""The score by which runs are compared: bits per byte of text, or the accuracy on a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A score.

    Args:
        key: its name in ``result.json`` and in metrics.
        label: its name in tables and sentences.
        higher: whether a higher value is better.
    """

    key: str
    label: str
    higher: bool = False

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one > other if self.higher else one < other


BITS = Metric("bits_per_byte", "bits per byte")
ACCURACY = Metric("accuracy", "accuracy", higher=True)


def metric_of(scores: Mapping[str, Any]) -> Metric:
    """The score by which a result is compared: accuracy if it has one, else bits per byte."""
    return ACCURACY if scores.get(ACCURACY.key) is not None else BITS

"""The scores by which runs are compared; lower is better in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCORES = {"bits_per_byte": "bits per byte", "error": "error rate", "loss": "loss"}
"""The names of scores in ``result.json``, and in sentences: bits per byte of text, the share of wrong answers of a task, nats
per predicted token. The first one that all compared runs have is used."""


def score_name(results: Sequence[Mapping[str, Any]]) -> str:
    """The first score that all results have.

    Example:
        >>> score_name([{"error": 0.1, "loss": 0.3}, {"error": 0.2, "loss": 0.5}])
        'error'
    """
    return next((name for name in SCORES if all(one.get(name) is not None for one in results)), "loss")

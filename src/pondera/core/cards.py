"""Result cards of the methods in the package, read from a generated file."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[1] / "cards.json"
"""Written by ``python -m tools.cards``; the full cards are in the repository, under ``results/cards/``."""


@dataclass(frozen=True)
class Card:
    """Summary of the results of one method.

    Args:
        claim: the claim of the paper in one line.
        verdict: ``reproduced``, ``partly``, ``not reproduced`` or ``claim not tested here``; ``control`` for a method
            without a claim.
        measured: the measurements in one line.
    """

    claim: str
    verdict: str
    measured: str


@functools.cache
def cards() -> dict[str, Card]:
    """All cards, by method name.

    Example:
        >>> cards()["RandomEviction"].verdict
        'control'
    """
    return {name: Card(**fields) for name, fields in json.loads(FILE.read_text(encoding="utf-8")).items()}

"""What went wrong in a run that finished: it learned nothing, or its halting rule decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pondera.core.run_config import RunConfig
from pondera.evaluation.halting_collapse import halting_collapse


def run_warnings(result: Mapping[str, Any], config: RunConfig) -> list[str]:
    """One sentence for each problem, without a full stop; empty if there is none, or if the result does not tell.

    Args:
        result: the result of the run, as in ``result.json``.
        config: its config.

    Example:
        >>> run_warnings({"loss": 6.2, "vocabulary": 300}, RunConfig())
        ['loss 6.20 is not below 5.70, that of guessing any of 300 tokens: nothing was learned; train longer or lower train.lr']
    """
    found = [_nothing_learned(result), halting_collapse(result, config.think)]
    return [warning for warning in found if warning is not None]


def _nothing_learned(result: Mapping[str, Any]) -> str | None:
    loss, vocabulary = result.get("loss"), result.get("vocabulary")
    if not isinstance(loss, (int, float)) or not isinstance(vocabulary, int) or loss < math.log(vocabulary):
        return None
    return (
        f"loss {loss:.2f} is not below {math.log(vocabulary):.2f}, that of guessing any of {vocabulary} tokens: nothing was "
        "learned; train longer or lower train.lr"
    )

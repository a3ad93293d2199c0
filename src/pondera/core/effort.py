"""Effort: one setting for the compute per token, shared by all methods."""

from __future__ import annotations

from dataclasses import dataclass

from pondera.core.errors import UserError, unknown

EFFORTS = {"low": 0.25, "medium": 0.5, "high": 1.0}


@dataclass(frozen=True)
class Effort:
    """The compute that a method may spend per token.

    Args:
        effort: from 0 (one pass per token) to 1 (as trained). A method of fixed depth runs this share of its passes after
            the first. A method that halts per token raises its threshold t to t ** effort, so fewer tokens reach it.
        max_passes: upper limit of the passes per token; default: `None`, the limit of the method.

    Example:
        >>> Effort(effort=0.5).passes(5), Effort(max_passes=2).passes(5), round(Effort(effort=0.5).threshold(0.01), 3)
        (3, 2, 0.1)
    """

    effort: float = 1.0
    max_passes: int | None = None

    @classmethod
    def of(cls, effort: str | float | None = None, max_passes: int | None = None) -> Effort:
        """Parses an effort as given by the user.

        Raises:
            UserError: the effort is neither a name nor a number from 0 to 1, or `max_passes` is less than 1.
        """
        if isinstance(effort, str) and effort in EFFORTS:
            effort = EFFORTS[effort]
        try:
            number = 1.0 if effort is None else float(effort)
        except ValueError:
            raise unknown("effort", str(effort), [*EFFORTS, "a number from 0 to 1"]) from None
        if not 0 <= number <= 1:
            raise UserError(f"effort={effort}: give low, medium, high or a number from 0 (one pass) to 1 (as trained)")
        if max_passes is not None and max_passes < 1:
            raise UserError(f"max_passes={max_passes}: give 1 or more")
        return cls(number, max_passes)

    def passes(self, most: int, adaptive: bool = False) -> int:
        """The maximum number of passes per token at this effort.

        Args:
            most: passes per token at full effort.
            adaptive: the number of passes differs between tokens; `threshold` decides it, unless the effort is 0.
        """
        wanted = most if adaptive and self.effort > 0 else 1 + round(self.effort * (most - 1))
        return wanted if self.max_passes is None else min(wanted, self.max_passes)

    def threshold(self, value: float) -> float:
        """The threshold of a halting method at this effort; `value` is the one at full effort, below 1."""
        return value**self.effort


FULL = Effort()

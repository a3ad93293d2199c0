"""How much thinking is wanted: one knob for every method."""

from __future__ import annotations

from dataclasses import dataclass

from pondera.core.errors import UserError, unknown

EFFORTS = {"low": 0.25, "medium": 0.5, "high": 1.0}


@dataclass(frozen=True)
class Effort:
    """How much thinking is wanted; the same knob for every method.

    Args:
        effort: from 0 (one pass for every token) to 1 (as trained). Where depth is fixed, the share of the passes beyond
            the first; where tokens differ, a threshold t of the method's becomes t ** effort, so fewer of them reach it.
        max_passes: no token gets more; none: as many as the method has.

    Example:
        >>> Effort(effort=0.5).passes(5), Effort(max_passes=2).passes(5), round(Effort(effort=0.5).threshold(0.01), 3)
        (3, 2, 0.1)
    """

    effort: float = 1.0
    max_passes: int | None = None

    @classmethod
    def of(cls, effort: str | float | None = None, max_passes: int | None = None) -> Effort:
        """From what a user gave.

        Raises:
            UserError: an effort that is neither a name nor a number from 0 to 1, or less than one pass.
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
            raise UserError(f"max_passes={max_passes}: a token takes at least 1 pass")
        return cls(number, max_passes)

    def passes(self, most: int, adaptive: bool = False) -> int:
        """The most passes that a token may take, of `most`.

        Args:
            most: passes that the method has.
            adaptive: tokens differ, and `threshold` has to say how far each goes.
        """
        wanted = most if adaptive and self.effort > 0 else 1 + round(self.effort * (most - 1))
        return wanted if self.max_passes is None else min(wanted, self.max_passes)

    def threshold(self, value: float) -> float:
        """A threshold below 1 that tokens have to reach to go on."""
        return value**self.effort


FULL = Effort()

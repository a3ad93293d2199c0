"""Student's t distribution: half the width of a confidence interval, for any level and any degrees of freedom."""

from __future__ import annotations

import math

MOST_FREEDOM = 1000.0
"""More degrees of freedom are treated like this number; the interval is then wider, by less than half a percent."""

PANELS = 200


def half_width(level: float, freedom: float) -> float:
    """Half the width of a two-sided interval around a mean, in standard errors.

    With ``t = sqrt(freedom) * tan(a)`` the density is proportional to ``cos(a) ** (freedom - 1)``. Its integral has no
    singularity, so Simpson's rule and bisection over the angle are enough.

    Args:
        level: the probability of the interval, e.g. 0.95; above 0 and below 1.
        freedom: degrees of freedom, 1 or more; not necessarily an integer.

    Example:
        >>> round(half_width(0.95, 2), 3), round(half_width(0.99, 9), 3)
        (4.303, 3.25)
    """
    freedom = min(freedom, MOST_FREEDOM)
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def probability(angle: float, freedom: float) -> float:
    """The probability of ``|t| < sqrt(freedom) * tan(angle)``."""
    step = angle / PANELS
    inner = [math.cos(step * number) ** (freedom - 1) for number in range(PANELS + 1)]
    integral = step / 3 * (inner[0] + 4 * sum(inner[1:-1:2]) + 2 * sum(inner[2:-1:2]) + inner[-1])
    whole = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)  # the integral up to a right angle is its inverse
    return integral * math.exp(whole) * 2 / math.sqrt(math.pi)

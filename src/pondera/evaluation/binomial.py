"""The interval of a share, such as an accuracy."""

from __future__ import annotations

import math

NORMAL = 1.959964
"""Half the width of a two-sided 95 % interval, in standard errors."""


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent rows; unlike the normal one, it is right near 0 and 1, too.

    Args:
        share: from 0 to 1.
        count: the number of rows.

    Example:
        >>> [round(bound, 3) for bound in share_interval(0.5, 100)], [round(bound, 3) for bound in share_interval(1.0, 10)]
        ([0.404, 0.596], [0.722, 1.0])
    """
    square = NORMAL**2 / count
    middle = share + square / 2
    margin = NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (middle - margin) / (1 + square)), min(1.0, (middle + margin) / (1 + square))

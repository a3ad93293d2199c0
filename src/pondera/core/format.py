"""Numbers in words, for terminals, reports and charts."""

from __future__ import annotations

import math

Point = tuple[float, float]
"""x and y of a curve."""


def human(value: float, digits: int = 3) -> str:
    """A number as people say it.

    Example:
        >>> human(1_250_000), human(3.2e12), human(48), human(0.25)
        ('1.25M', '3.2T', '48', '0.25')
    """
    power = 0 if abs(value) < 1 else min(6, int(math.log10(abs(value)) // 3))
    if power < 6 and abs(float(f"{value / 1000**power:.{digits}g}")) >= 1000:
        power += 1  # 999.9K rounds to 1M
    return f"{float(f'{value / 1000**power:.{digits}g}'):g}{'KMGTPE'[power - 1] if power else ''}"

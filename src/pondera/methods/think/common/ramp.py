"""Ramps over the training, given as shares of its steps."""

from __future__ import annotations

from pondera.core.errors import UserError

Ramp = tuple[float, float]
"""The shares of the training at which a ramp starts and ends."""


def checked(ramp: Ramp) -> Ramp:
    """Returns the ramp as a tuple.

    Raises:
        UserError: it is not two ascending shares.
    """
    if len(ramp) != 2 or not 0 <= ramp[0] <= ramp[1] <= 1:
        raise UserError(f"ramp={ramp}: give two shares of the training, such as (0.2, 0.6)")
    return (ramp[0], ramp[1])


def height(ramp: Ramp, progress: float) -> float:
    """The height of a ramp from 0 to 1, after a share of the training.

    Example:
        >>> [height((0.2, 0.6), progress) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    start, end = ramp
    if progress <= start < 1:
        return 0.0
    return min(1.0, (progress - start) / (end - start)) if end > start else 1.0

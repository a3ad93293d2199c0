"""Schedules of α and of the reward exponent: hold, then decay to the end value.

A schedule is a share of the distance to the end value, from 1 to 0, as a function of the step.
"""

from __future__ import annotations

import math

from pondera.core.errors import UserError, unknown

DECAY = 4.0
"""Time constants of the exponential decay in `exp` (arXiv 2602.01749, stored runs)."""
TAIL = 0.2
"""Share of the decay that `exact` spends at the end value itself."""
FORMS = ("constant", "exp", "exact")


def remaining_share(step: int, steps: int, form: str, hold: float) -> float:
    """The share of the distance to the end value at a step.

    ``constant`` stays at 1. ``exp`` holds 1 for ``hold * steps`` steps and then decays as exp(−4u), u from 0 to 1: at the end
    1.8 % of the distance is left. ``exact`` follows the same curve, shifted and scaled to reach 0 before the end, and stays at
    exactly 0 for the last fifth of the decay (at least one step).

    Args:
        step: the step, from 0.
        steps: the number of steps of the run.
        form: ``constant``, ``exp`` or ``exact``.
        hold: share of the steps before the decay.

    Example:
        >>> [round(remaining_share(k, 100, "exact", 0.5), 3) for k in (0, 50, 60, 90, 99)]
        [1.0, 1.0, 0.356, 0.0, 0.0]
        >>> round(remaining_share(100, 100, "exp", 0.5), 4)
        0.0183
    """
    check_schedule(form, hold)
    start, last = hold * steps, max(1.0, TAIL * (1 - hold) * steps)
    if form == "exact" and step >= steps - last:
        return 0.0
    if form == "constant" or step < start:
        return 1.0
    if form == "exp":
        return math.exp(-DECAY * (step - start) / (steps - start))
    u = (step - start) / (steps - last - start)
    return (math.exp(-DECAY * u) - math.exp(-DECAY)) / (1 - math.exp(-DECAY))


def check_schedule(form: str, hold: float) -> None:
    """Refuses an unknown form, or a hold outside of [0, 1)."""
    if form not in FORMS:
        raise unknown("anneal", form, FORMS)
    if not 0 <= hold < 1:
        raise UserError(f"hold={hold}: give the share of the steps before the decay, from 0 to below 1, e.g. hold=0.9")

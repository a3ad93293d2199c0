"""The α offset: log(α/(1−α)) for every edge of a trajectory. All objectives take it from here.

The convention, in one place: a trajectory has as many edges as valid transitions in its mask. Where stopping is an action, its
transition is one of them. With `exit_edge`, one further edge joins every finished object to the end of the chain, so that
α F(x) = (1−α) R(x) and log F(x) = log R(x) − log c; without it, log F(x) = log R(x). Both keep the same law of finished
objects, because the exit edge multiplies every flow by the same constant.

Shapes: B trajectories, T transitions, S = T + 1 states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pondera.core.errors import UserError


def log_odds(alpha: float) -> float:
    """log c = log(α/(1−α)), exactly 0 at α = ½.

    Raises:
        UserError: α is not between 0 and 1.

    Example:
        >>> log_odds(0.5), round(log_odds(0.9), 4)
        (0.0, 2.1972)
    """
    if not 0 < alpha < 1:  # NaN is refused, too
        raise UserError(
            f"alpha={alpha}: give a number between 0 and 1 (0.5 is the ordinary objective, e.g. TB(alpha=0.7))"
        )
    return math.log(alpha / (1 - alpha))


def check_log_rewards(log_R: Tensor) -> None:
    """Refuses log rewards that are not finite.

    Raises:
        UserError: a log reward is NaN, +inf or -inf; the message has its place and says what to do.
    """
    bad = (~torch.isfinite(log_R)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        value = log_R[tuple(place)].item()
        advice = (
            "a reward of 0 has no logarithm: mask the actions that lead to it, or give it a small reward "
            "(train.min_log_reward)"
            if value == -math.inf
            else "give a finite log reward for every object"
        )
        raise UserError(f"log_R: object {', '.join(map(str, place))} has the log reward {value}; {advice}")


def log_F_with_ends(log_F_BS: Tensor, log_R_B: Tensor, mask_BT: Tensor, log_c: float, exit_edge: bool) -> Tensor:
    """Log flows of the states of each trajectory, in which the finished object has its reward in place of a learned flow.

    Args:
        log_F_BS: learned log flows; entries at and after the end of a trajectory are not read.
        log_R_B: log reward of the finished object.
        mask_BT: which transitions are part of the trajectory.
        log_c: the log odds of α.
        exit_edge: whether the exit edge counts.
    """
    check_log_rewards(log_R_B)
    ended_BS = torch.arange(log_F_BS.shape[1], device=log_F_BS.device) >= mask_BT.sum(1, keepdim=True)
    end_B = log_R_B - log_c if exit_edge else log_R_B
    return torch.where(ended_BS, end_B[:, None].to(log_F_BS.dtype), log_F_BS)


def steps(log_pf_BT: Tensor, log_pb_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The two log-probabilities with 0 in place of masked transitions, whose values may be infinite."""
    return log_pf_BT.masked_fill(~mask_BT, 0.0), log_pb_BT.masked_fill(~mask_BT, 0.0)

"""Trajectory balance with α. Shapes: B trajectories, T transitions, S = T + 1 states."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.objective.base import FlowBatch, Objective, given
from pondera.methods.objective.common.offset import check_log_rewards, log_odds, steps


def trajectory_balance(
    log_pf_BT: Tensor,
    log_pb_BT: Tensor,
    log_z: Tensor,
    log_R_B: Tensor,
    mask_BT: Tensor,
    alpha: float = 0.5,
    exit_edge: bool = False,
) -> Tensor:
    """The residual of each trajectory: log Z + Σ log P_F − log R − Σ log P_B + edges · log c.

    Args:
        log_pf_BT, log_pb_BT: log-probabilities of the forward and backward steps.
        log_z: the learned log of the sum of all rewards, a scalar or one number per trajectory.
        log_R_B: log rewards.
        mask_BT: which transitions count.
        alpha: weight of the forward step.
        exit_edge: whether the exit edge counts, see `pondera.methods.objective.common.offset`.

    Returns:
        ``[B]``. The loss is the mean of the squares.

    Raises:
        UserError: a log reward is not finite, or α is not between 0 and 1.
    """
    check_log_rewards(log_R_B)
    log_c = log_odds(alpha)
    pf_BT, pb_BT = steps(log_pf_BT, log_pb_BT, mask_BT)
    residual_B = log_z + pf_BT.sum(1) - log_R_B - pb_BT.sum(1)
    return residual_B + (mask_BT.sum(1) + int(exit_edge)).to(residual_B.dtype) * log_c


class TB(Objective):
    """Trajectory balance: one residual per trajectory, and one learned number, log Z.

    With α, log c is added for each edge. If all trajectories have n edges, this is TB whose log Z starts n · log c too high,
    step for step: what is sampled at the optimum does not change, and annealing α to ½ moves log Z away from its value at
    once.

    Source: Malkin et al., Trajectory balance, arXiv 2201.13259; with α: Chen et al., arXiv 2602.01749.
    Cost: the forward and backward log-probabilities of each trajectory.
    When not to use it: for long trajectories, where the variance of one residual per trajectory is large (use SubTB).
    Resolved: the authors' code counts the exit edge; here only transitions count, which shifts log Z by a constant.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.
        compensate: move log Z by the known amount while α moves; on graded environments only.

    Example:
        >>> import torch
        >>> half = torch.full((1, 1), 0.5).log()
        >>> batch = FlowBatch(torch.tensor([[True]]), torch.zeros(1), half, torch.zeros(1, 1), torch.full((1, 2), 2.0).log())
        >>> TB().loss(batch, 0.5).item()
        0.0
    """

    paper: ClassVar[str] = "Trajectory balance, arXiv 2201.13259; α: arXiv 2602.01749"
    cost: ClassVar[str] = "one residual per trajectory; no flows of states"
    needs: ClassVar[str] = "log_z"

    def __init__(
        self, alpha: float = 0.5, anneal: str = "constant", hold: float = 0.9, compensate: bool = False
    ) -> None:
        super().__init__(alpha, anneal, hold, compensate)

    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The mean of the squared residuals; log Z is the first column of `log_F_BS`."""
        log_pf_BT, log_pb_BT = given(batch.log_pf_BT, "log_pf"), given(batch.log_pb_BT, "log_pb")
        log_z = given(batch.log_F_BS, "log_F")[:, 0]
        return trajectory_balance(log_pf_BT, log_pb_BT, log_z, batch.log_R_B, batch.mask_BT, alpha).pow(2).mean()

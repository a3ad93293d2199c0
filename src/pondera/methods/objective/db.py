"""Detailed balance with α. Shapes: B trajectories, T transitions, S = T + 1 states."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.objective.base import FlowBatch, Objective, given
from pondera.methods.objective.common.offset import log_F_with_ends, log_odds, steps


def detailed_balance(
    log_pf_BT: Tensor,
    log_pb_BT: Tensor,
    log_F_BS: Tensor,
    log_R_B: Tensor,
    mask_BT: Tensor,
    alpha: float = 0.5,
    exit_edge: bool = False,
) -> Tensor:
    """The residual of each transition: log F(s) + log P_F(s' | s) − log F(s') − log P_B(s | s') + log c.

    Args:
        log_pf_BT, log_pb_BT: log-probabilities of the forward and backward steps.
        log_F_BS: log flows of the states; the finished object has its reward instead.
        log_R_B: log rewards.
        mask_BT: which transitions count.
        alpha: weight of the forward step.
        exit_edge: whether the exit edge counts, see `pondera.methods.objective.common.offset`.

    Returns:
        ``[B, T]``, 0 where the mask is False. The loss is the mean of the squares over the transitions of the batch.

    Raises:
        UserError: a log reward is not finite, or α is not between 0 and 1.
    """
    log_c = log_odds(alpha)
    flows_BS = log_F_with_ends(log_F_BS, log_R_B, mask_BT, log_c, exit_edge)
    pf_BT, pb_BT = steps(log_pf_BT, log_pb_BT, mask_BT)
    residual_BT = flows_BS[:, :-1] + pf_BT - flows_BS[:, 1:] - pb_BT + log_c
    return residual_BT.masked_fill(~mask_BT, 0.0)


def mean_square(residual_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of the squared residuals over the transitions of a batch."""
    return residual_BT.pow(2).sum() / mask_BT.sum().clamp_min(1)


class DB(Objective):
    """Detailed balance: one residual per transition, with a learned flow of each state.

    With α, log c is added to every residual.

    Source: Bengio et al., GFlowNet foundations, arXiv 2111.09266; with α: Chen et al., arXiv 2602.01749.
    Cost: a flow head, and one residual per transition.
    When not to use it: for long trajectories with a reward at the end only, where it moves back one step at a time (use SubTB).
    Resolved: the mean runs over all transitions of the batch, as in the authors' code.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.
        compensate: move log F by the known amount while α moves; on graded environments only.

    Example:
        >>> import torch
        >>> half = torch.full((1, 1), 0.5).log()
        >>> batch = FlowBatch(torch.tensor([[True]]), torch.zeros(1), half, torch.zeros(1, 1), torch.full((1, 2), 2.0).log())
        >>> DB().loss(batch, 0.5).item()
        0.0
    """

    paper: ClassVar[str] = "Detailed balance, arXiv 2111.09266; α: arXiv 2602.01749"
    cost: ClassVar[str] = "one residual per transition; a flow head"

    def __init__(
        self, alpha: float = 0.5, anneal: str = "constant", hold: float = 0.9, compensate: bool = False
    ) -> None:
        super().__init__(alpha, anneal, hold, compensate)

    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The mean of the squared residuals over all transitions."""
        log_pf_BT, log_pb_BT = given(batch.log_pf_BT, "log_pf"), given(batch.log_pb_BT, "log_pb")
        log_F_BS = given(batch.log_F_BS, "log_F")
        residual_BT = detailed_balance(log_pf_BT, log_pb_BT, log_F_BS, batch.log_R_B, batch.mask_BT, alpha)
        return mean_square(residual_BT, batch.mask_BT)

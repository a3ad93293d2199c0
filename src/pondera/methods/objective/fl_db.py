"""Forward-looking detailed balance with α. Shapes: B trajectories, T transitions, S = T + 1 states."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.objective.base import FlowBatch, Objective, given
from pondera.methods.objective.common.offset import check_log_rewards, log_F_with_ends, log_odds, steps
from pondera.methods.objective.db import mean_square


def forward_looking_balance(
    log_pf_BT: Tensor,
    log_pb_BT: Tensor,
    log_rest_BS: Tensor,
    log_partial_BS: Tensor,
    log_R_B: Tensor,
    mask_BT: Tensor,
    alpha: float = 0.5,
    exit_edge: bool = False,
) -> Tensor:
    """The residual of each transition, in which the flow is F(s) = F̃(s) · R_partial(s) and only F̃ is learned.

    Args:
        log_pf_BT, log_pb_BT: log-probabilities of the forward and backward steps.
        log_rest_BS: log F̃, the learned part.
        log_partial_BS: log reward of what is built so far; entries after the end are not read.
        log_R_B: log rewards of finished objects, which replace the partial ones at the end.
        mask_BT: which transitions count.
        alpha: weight of the forward step.
        exit_edge: whether the exit edge counts, see `pondera.methods.objective.common.offset`.

    Returns:
        ``[B, T]``, 0 where the mask is False.

    Raises:
        UserError: a log reward is not finite, or α is not between 0 and 1.
    """
    check_log_rewards(log_R_B)
    log_c = log_odds(alpha)
    zero_B = log_R_B.new_zeros(log_R_B.shape)
    rest_BS = log_F_with_ends(log_rest_BS, zero_B, mask_BT, log_c, exit_edge)
    partial_BS = log_F_with_ends(log_partial_BS, log_R_B, mask_BT, log_c, False)
    pf_BT, pb_BT = steps(log_pf_BT, log_pb_BT, mask_BT)
    gain_BT = partial_BS[:, 1:] - partial_BS[:, :-1]
    residual_BT = rest_BS[:, :-1] + pf_BT - rest_BS[:, 1:] - pb_BT - gain_BT + log_c
    return residual_BT.masked_fill(~mask_BT, 0.0)


class FLDB(Objective):
    """Forward-looking detailed balance: the partial reward of a state is part of its flow, and the rest is learned.

    Every transition then sees its share of the reward at once. The offset log c is added to every transition.

    Source: Pan et al., Better training of GFlowNets with local credit, arXiv 2302.01687; with α: Chen et al., arXiv 2602.01749.
    Cost: that of DB, and a reward of every state.
    When not to use it: where unfinished states have no meaningful reward.
    Resolved: the finished object has F̃ = 1.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.
        compensate: move log F by the known amount while α moves; on graded environments only.

    Example:
        >>> import torch
        >>> half, zero = torch.full((1, 1), 0.5).log(), torch.zeros(1, 2)
        >>> batch = FlowBatch(torch.tensor([[True]]), torch.zeros(1), half, half, zero, zero)
        >>> FLDB().loss(batch, 0.5).item()
        0.0
    """

    paper: ClassVar[str] = "Forward-looking GFlowNets, arXiv 2302.01687; α: arXiv 2602.01749"
    cost: ClassVar[str] = "one residual per transition; a flow head and a reward of every state"
    needs: ClassVar[str] = "partial"

    def __init__(
        self, alpha: float = 0.5, anneal: str = "constant", hold: float = 0.9, compensate: bool = False
    ) -> None:
        super().__init__(alpha, anneal, hold, compensate)

    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The mean of the squared residuals over all transitions; `log_F_BS` has the learned part."""
        log_pf_BT, log_pb_BT = given(batch.log_pf_BT, "log_pf"), given(batch.log_pb_BT, "log_pb")
        rest_BS, partial_BS = given(batch.log_F_BS, "log_F"), given(batch.log_partial_BS, "log_partial")
        args = (log_pf_BT, log_pb_BT, rest_BS, partial_BS, batch.log_R_B, batch.mask_BT)
        return mean_square(forward_looking_balance(*args, alpha), batch.mask_BT)

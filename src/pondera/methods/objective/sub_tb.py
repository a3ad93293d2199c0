"""Sub-trajectory balance with α. Shapes: B trajectories, T transitions, S = T + 1 states."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.objective.base import FlowBatch, Objective, given
from pondera.methods.objective.common.offset import log_F_with_ends, log_odds, steps


def sub_trajectory_balance(
    log_pf_BT: Tensor,
    log_pb_BT: Tensor,
    log_F_BS: Tensor,
    log_R_B: Tensor,
    mask_BT: Tensor,
    alpha: float = 0.5,
    exit_edge: bool = False,
    ends_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual of every pair of states i < j of a trajectory, and which pairs exist.

    log F(s_i) + Σ log P_F − log F(s_j) − Σ log P_B + (j − i) · log c, which is the sum of the residuals of detailed balance
    between the two states.

    Args:
        log_pf_BT, log_pb_BT: log-probabilities of the forward and backward steps.
        log_F_BS: log flows of the states; the finished object has its reward instead.
        log_R_B: log rewards.
        mask_BT: which transitions count.
        alpha: weight of the forward step.
        exit_edge: whether the exit edge counts, see `pondera.methods.objective.common.offset`.
        ends_BS: the states between which residuals are taken, such as ends of sentences; default: `None`, all states.

    Returns:
        residuals ``[B, S, S]`` (0 where there is no pair) and pairs ``[B, S, S]``.

    Raises:
        UserError: a log reward is not finite, or α is not between 0 and 1.
    """
    log_c = log_odds(alpha)
    flows_BS = log_F_with_ends(log_F_BS, log_R_B, mask_BT, log_c, exit_edge)
    pf_BT, pb_BT = steps(log_pf_BT, log_pb_BT, mask_BT)
    passed_BS = torch.nn.functional.pad((pf_BT - pb_BT + log_c).masked_fill(~mask_BT, 0.0).cumsum(1), (1, 0))
    level_BS = flows_BS - passed_BS
    states = torch.arange(level_BS.shape[1], device=level_BS.device)
    there_BS = states <= mask_BT.sum(1, keepdim=True)
    if ends_BS is not None:
        there_BS = there_BS & ends_BS
    pairs_BSS = (states[:, None] < states) & there_BS[:, :, None] & there_BS[:, None, :]
    residual_BSS = level_BS[:, :, None] - level_BS[:, None, :]
    return residual_BSS.masked_fill(~pairs_BSS, 0.0), pairs_BSS


def weighted_square(residual_BSS: Tensor, pairs_BSS: Tensor, lam: float) -> Tensor:
    """Σ λ^(j−i) δ² / Σ λ^(j−i) over the pairs of each trajectory, then the mean over trajectories that have pairs."""
    states = torch.arange(pairs_BSS.shape[1], device=pairs_BSS.device)
    far_SS = (states - states[:, None]).clamp_min(0)
    furthest_B = (pairs_BSS * far_SS).amax((1, 2)) if lam > 1 else far_SS.new_zeros(len(pairs_BSS))
    exponent_BSS = far_SS - furthest_B[:, None, None]  # the largest weight is 1, so that no power overflows
    weight_BSS = torch.exp(exponent_BSS.to(residual_BSS.dtype) * math.log(lam)) * pairs_BSS
    total_B = weight_BSS.sum((1, 2))
    tiny = torch.finfo(residual_BSS.dtype).tiny
    loss_B = (weight_BSS * residual_BSS.pow(2)).sum((1, 2)) / total_B.clamp_min(tiny)
    return loss_B.sum() / (total_B > 0).sum().clamp_min(1)


class SubTB(Objective):
    """Sub-trajectory balance: residuals of all parts of a trajectory, weighted by λ to the power of their length.

    Small λ is close to detailed balance, large λ to trajectory balance. With α, log c is added for each edge of a part.

    Source: Madan et al., Learning GFlowNets from partial episodes, arXiv 2209.12782; with α: arXiv 2602.01749.
    Cost: that of DB, and T²/2 residuals, which are differences of cumulative sums.
    When not to use it: for very long trajectories, where the T² table does not fit.
    Resolved: weights are normalised within each trajectory, then averaged over trajectories (``geometric_within`` in torchgfn).
        The paper's code for α was not published; the offset is derived from the edge condition.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        lam: λ, above 0; may be above 1.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.
        compensate: move log F by the known amount while α moves; on graded environments only.

    Example:
        >>> import torch
        >>> half = torch.full((1, 1), 0.5).log()
        >>> batch = FlowBatch(torch.tensor([[True]]), torch.zeros(1), half, torch.zeros(1, 1), torch.full((1, 2), 2.0).log())
        >>> SubTB(lam=0.9).loss(batch, 0.5).item()
        0.0
    """

    paper: ClassVar[str] = "Sub-trajectory balance, arXiv 2209.12782; α: arXiv 2602.01749"
    cost: ClassVar[str] = "T²/2 residuals per trajectory; a flow head"

    def __init__(
        self,
        alpha: float = 0.5,
        lam: float = 0.99,
        anneal: str = "constant",
        hold: float = 0.9,
        compensate: bool = False,
    ) -> None:
        super().__init__(alpha, anneal, hold, compensate)
        if not 0 < lam < math.inf:
            raise UserError(f"lam={lam}: give a number above 0, e.g. SubTB(lam=0.99)")
        self.lam = lam

    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The weighted mean of the squared residuals of all parts."""
        log_pf_BT, log_pb_BT = given(batch.log_pf_BT, "log_pf"), given(batch.log_pb_BT, "log_pb")
        log_F_BS = given(batch.log_F_BS, "log_F")
        found = sub_trajectory_balance(log_pf_BT, log_pb_BT, log_F_BS, batch.log_R_B, batch.mask_BT, alpha)
        return weighted_square(*found, self.lam)

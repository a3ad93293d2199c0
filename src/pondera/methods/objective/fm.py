"""Flow matching with α. Shapes: B trajectories, T transitions, P parents, C children, N states."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pondera.methods.objective.base import FlowBatch, Objective, given
from pondera.methods.objective.common.offset import check_log_rewards, log_odds
from pondera.methods.objective.db import mean_square


def flow_matching(log_in: Tensor, log_out: Tensor, alpha: float = 0.5) -> Tensor:
    """The residual of each state: log Σ inflow − log Σ outflow + log c, from α · inflow = (1−α) · outflow.

    Args:
        log_in: ``[..., P]``, log flows of the edges into a state; −inf where there is no parent.
        log_out: ``[..., C]``, log flows of the edges out of it; for a finished object its log reward is the only one.
        alpha: weight of the forward step.

    Returns:
        ``[...]``.

    Raises:
        UserError: α is not between 0 and 1.
    """
    return log_in.logsumexp(-1) - log_out.logsumexp(-1) + log_odds(alpha)


class FM(Objective):
    """Flow matching: what flows into a state equals what flows out; the flows of edges are learned.

    With α, α times the inflow equals 1 − α times the outflow.

    Source: Bengio et al., Flow network based generative models, arXiv 2106.04399; the form with α is derived from arXiv
        2602.01749.
    Cost: the flows of all parents of all visited states, P times the network.
    When not to use it: where states have many parents; the other objectives need one.
    Resolved: there is no P_B; the law at α ≠ ½ is that of the P_B which the learned flows imply.

    Args:
        alpha: weight of the forward step at the start; 0.5 is the ordinary objective.
        anneal: how α goes to ½: ``constant``, ``exp`` (the paper's, which ends near ½) or ``exact`` (ends at ½).
        hold: share of the steps before α moves.

    Example:
        >>> import torch
        >>> flow_matching(torch.tensor([1.0, 3.0]).log(), torch.tensor([4.0]).log()).item()
        0.0
    """

    paper: ClassVar[str] = "Flow matching, arXiv 2106.04399; α: arXiv 2602.01749"
    cost: ClassVar[str] = "the network on all parents of visited states"
    needs: ClassVar[str] = "edges"

    def __init__(self, alpha: float = 0.5, anneal: str = "constant", hold: float = 0.9) -> None:
        super().__init__(alpha, anneal, hold)

    def loss(self, batch: FlowBatch, alpha: float) -> Tensor:
        """The mean of the squared residuals over the states after each transition."""
        check_log_rewards(batch.log_R_B)
        mask_BT = batch.mask_BT
        # Rows without edges would have infinite sums, and their gradients NaN.
        log_in = given(batch.log_in_BTP, "log_in").masked_fill(~mask_BT[..., None], 0.0)
        log_out = given(batch.log_out_BTC, "log_out").masked_fill(~mask_BT[..., None], 0.0)
        residual_BT = flow_matching(log_in, log_out, alpha).masked_fill(~mask_BT, 0.0)
        return mean_square(residual_BT, mask_BT)

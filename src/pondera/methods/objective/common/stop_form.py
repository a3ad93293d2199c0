"""Flows from stop probabilities, where every state can be finished: F(s) · P_F(stop | s) = R(s).

Shapes: B trajectories, S states.
"""

from __future__ import annotations

from torch import Tensor

from pondera.methods.objective.common.offset import check_log_rewards, log_odds


def stop_flows(log_R_BS: Tensor, log_stop_BS: Tensor, alpha: float = 0.5) -> Tensor:
    """Log flows that satisfy the condition of the stop edge, α F(s) P_F(stop | s) = (1−α) R(s), by construction.

    In place of learned flows, they make `DB` and `SubTB` objectives of rewards and probabilities alone. The stop transition
    then has no residual, so it is left out of the mask; a trajectory ends at its last state s, whose `log_R` in those
    objectives is the log flow of this function there.

    Source: modified detailed balance of Deleu et al., arXiv 2202.13903; SubTB between finished states as in FoSS and in
    GFlowNet tuning of language models (arXiv 2310.04363). The offset is derived from the edge condition of arXiv 2602.01749.

    Args:
        log_R_BS: log reward of every state, if the object were finished there.
        log_stop_BS: log-probability of stopping there.
        alpha: weight of the forward step.

    Raises:
        UserError: a log reward is not finite, or α is not between 0 and 1.

    Example:
        >>> import torch
        >>> stop_flows(torch.tensor([[0.0]]), torch.tensor([[0.5]]).log()).exp().tolist()
        [[2.0]]
    """
    check_log_rewards(log_R_BS)
    return log_R_BS - log_odds(alpha) - log_stop_BS

"""What a perfect sampler of R/Z finds: the control of every count of modes. Shapes: K entries of a table of rewards."""

from __future__ import annotations

import torch

from pondera.flows.environments.base import Environment, RewardTable
from pondera.flows.graph import Graph


def reward_table(env: Environment, graph: Graph | None = None) -> RewardTable | None:
    """How often each reward occurs: from the listed states, or as the environment counts it; `None`: neither is possible."""
    if graph is None:
        return env.reward_table()
    last = graph.last_N
    return RewardTable(
        graph.log_R_N[last], torch.ones(int(last.sum()), dtype=torch.float64), env.is_mode(graph.state_NC[last])
    )


def expected_modes(table: RewardTable, samples: int) -> float:
    """Expected number of different modes among independent samples of R/Z: Σ over modes of 1 − (1 − R/Z)^samples.

    Args:
        table: of rewards.
        samples: number of samples.

    Example:
        >>> table = RewardTable(torch.zeros(1).double(), torch.tensor([4.0]).double(), torch.tensor([True]))
        >>> [round(expected_modes(table, samples), 6) for samples in (1, 100)]
        [1.0, 4.0]
    """
    log_R_K = table.log_R_K.double()
    log_p_K = log_R_K - (log_R_K + table.count_K.log()).logsumexp(0)
    found_K = -torch.expm1(samples * torch.log1p(-log_p_K.exp().clamp_max(1.0)))
    return float((found_K * table.count_K)[table.mode_K].sum())


def expected_log_reward(table: RewardTable) -> float:
    """The log of E[R] under R/Z, which is Σ R² / Σ R."""
    log_n_K = table.count_K.log()
    return float((2 * table.log_R_K + log_n_K).logsumexp(0) - (table.log_R_K + log_n_K).logsumexp(0))

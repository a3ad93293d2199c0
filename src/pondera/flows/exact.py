"""Exact laws on a listed graph: the target, what a forward policy draws, and the optimum of every objective with α.

Shapes: N states, E edges, X finished objects. All numbers are logarithms in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.graph import Graph, sum_by
from pondera.methods.objective.common.offset import log_odds


def log_z(graph: Graph) -> float:
    """The log of the sum of all rewards."""
    return float(graph.log_R_N.logsumexp(0))


def target(graph: Graph) -> Tensor:
    """R/Z of the finished objects, ``[N]``; −inf for other states."""
    return graph.log_R_N - graph.log_R_N.logsumexp(0)


def uniform_backward(graph: Graph) -> Tensor:
    """The backward policy that chooses every parent with the same probability, ``[E]``."""
    return -torch.bincount(graph.child_E, minlength=len(graph.level_N)).double().log()[graph.child_E]


def path_counts(graph: Graph) -> Tensor:
    """The log of the number of ways from the root to each state, ``[N]``."""
    return _spread(graph, torch.zeros(len(graph.parent_E), dtype=torch.float64))


def drawn_by(graph: Graph, log_pf_E: Tensor) -> Tensor:
    """The law of finished objects that a forward policy draws, by dynamic programming from the root.

    Args:
        graph: the states and edges.
        log_pf_E: log-probability of each edge at its parent.

    Returns:
        ``[N]``; −inf for states that are not finished.

    Raises:
        UserError: the probabilities at a state do not sum to 1.
    """
    log_pf_E = log_pf_E.double()
    total_N = sum_by(log_pf_E, graph.parent_E, len(graph.level_N))
    wrong_N = ~graph.last_N & ((total_N.exp() - 1).abs() > 1e-4)
    if wrong_N.any():
        at = int(wrong_N.nonzero()[0])
        raise UserError(
            f"the probabilities of the actions at state {graph.state_NC[at].tolist()} sum to {total_N[at].exp():.4g}, not to 1"
        )
    return torch.where(graph.last_N, _spread(graph, log_pf_E), -torch.inf)


def _spread(graph: Graph, log_E: Tensor) -> Tensor:
    """Σ over ways from the root of the product of their edges, for each state."""
    count = len(graph.level_N)
    found_N = torch.full((count,), -torch.inf, dtype=torch.float64)
    found_N[0] = 0.0
    for edges in graph.by_child:
        child_E = graph.child_E[edges]
        reached_N = sum_by(found_N[graph.parent_E[edges]] + log_E[edges], child_E, count)
        found_N = torch.where(torch.isfinite(reached_N), reached_N, found_N)
    return found_N


def check_backward(graph: Graph, log_pb_E: Tensor) -> None:
    """Refuses a backward policy whose probabilities do not sum to 1 at a state; such a policy changes the target.

    Raises:
        UserError: with the state and the sum.
    """
    total_N = sum_by(log_pb_E.double(), graph.child_E, len(graph.level_N)).exp()
    wrong_N = (total_N - 1).abs() > 1e-6
    wrong_N[0] = False
    if wrong_N.any():
        at = int(wrong_N.nonzero()[0])
        raise UserError(
            f"backward policy: the probabilities of the parents of state {graph.state_NC[at].tolist()} sum to "
            f"{total_N[at]:.4g}, not to 1; with it, objects would be drawn in proportion to something other than their reward"
        )


def optimum(
    graph: Graph, log_pb_E: Tensor, alpha: float = 0.5, exit_edge: bool = False, check: bool = True
) -> tuple[Tensor, Tensor]:
    """The flows and the forward policy at which every objective with α is 0, from the end to the root.

    F(s) = Σ over children F(s') P_B(s | s') / c, and P_F(s' | s) = F(s') P_B(s | s') / (c F(s)).

    Source: the edge condition α F(s) P_F(s' | s) = (1−α) F(s') P_B(s | s') of arXiv 2602.01749, solved here.

    Args:
        graph: the states and edges.
        log_pb_E: log-probability of each edge at its child.
        alpha: weight of the forward step.
        exit_edge: whether the exit edge counts, see `pondera.methods.objective.common.offset`.
        check: refuse a backward policy whose probabilities do not sum to 1.

    Returns:
        log flows ``[N]`` and log P_F ``[E]``.
    """
    if check:
        check_backward(graph, log_pb_E)
    log_c, count = log_odds(alpha), len(graph.level_N)
    flow_N = graph.log_R_N - (log_c if exit_edge else 0.0)
    for edges in reversed(graph.layers):
        through = flow_N[graph.child_E[edges]] + log_pb_E[edges] - log_c
        out_N = sum_by(through, graph.parent_E[edges], count)
        flow_N = torch.where(graph.last_N, flow_N, torch.maximum(flow_N, out_N))
    log_pf_E = flow_N[graph.child_E] + log_pb_E - log_c - flow_N[graph.parent_E]
    return flow_N, log_pf_E


def tilt(graph: Graph, log_pb_E: Tensor, alpha: float) -> Tensor:
    """log E[c^(−edges)] over the backward walks from each state, ``[N]``.

    The optimum with α draws x in proportion to R(x) times this factor. Samples of it, weighted by its inverse, are those of
    R/Z.
    """
    return _spread(graph, log_pb_E.double() - log_odds(alpha))


def total_variation(log_p_N: Tensor, log_q_N: Tensor) -> float:
    """Half the sum of absolute differences of two laws, from 0 to 1."""
    return float((log_p_N.exp() - log_q_N.exp()).abs().sum()) / 2


def mean_length(graph: Graph, log_pf_E: Tensor) -> float:
    """The mean number of steps of a forward policy."""
    reach_N = _spread(graph, log_pf_E.double())
    return float((reach_N[graph.parent_E] + log_pf_E).exp().sum())

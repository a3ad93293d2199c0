"""The report on a sampler: modes, mean reward against its target, distance to the target, and what a perfect sampler finds.

A count of modes alone does not say whether a sampler is right: a sampler that is too sharp finds more. The four numbers are
therefore computed, and printed, together.

Shapes: N states, E edges, X finished objects, K walks per object.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pondera.flows import exact
from pondera.flows.environments.base import Environment
from pondera.flows.graph import Graph, countable, listed
from pondera.flows.perfect import expected_log_reward, expected_modes, reward_table
from pondera.flows.policy import FlowPolicy
from pondera.flows.sampling import sample, walk_back

TESTED, WALKS, DRAWN = 512, 32, 2048


@dataclass(frozen=True)
class FlowReport:
    """How far a sampler is from drawing objects in proportion to their reward.

    Args:
        samples: number of fresh samples among which modes were counted.
        modes_found: different modes among them.
        perfect_modes: modes that a perfect sampler is expected to find in as many samples; `None`: it cannot be counted.
        modes: number of modes; `None`: it cannot be counted.
        mean_reward: E[R] of the sampler, exact if `exact`.
        target_mean_reward: E[R] of a perfect sampler.
        tv: total variation distance to R/Z, from 0 to 1; `None` if states cannot be listed.
        spearman: rank correlation of log probability and log reward.
        slope: of log probability over log reward: the effective exponent of the reward, 1 if right.
        exact: whether the law of the sampler was computed, not estimated.
    """

    samples: int
    modes_found: int
    perfect_modes: float | None
    modes: int | None
    mean_reward: float
    target_mean_reward: float | None
    tv: float | None
    spearman: float | None
    slope: float | None
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """As a plain mapping."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """The four numbers, with their controls."""
        of = "" if self.modes is None else f" of {self.modes:,}"
        perfect = "cannot be counted" if self.perfect_modes is None else f"{self.perfect_modes:.4g}"
        target = "unknown" if self.target_mean_reward is None else f"{self.target_mean_reward:.4g}"
        distance = [] if self.tv is None else [f"total variation {self.tv:.4f} (0: right)"]
        if self.spearman is not None and self.slope is not None:
            distance.append(f"Spearman {self.spearman:.3f}, slope {self.slope:.3f} (1: right)")
        return [
            ("modes found", f"{self.modes_found:,}{of} in {self.samples:,} samples"),
            ("a perfect sampler", f"{perfect} modes in as many samples"),
            ("mean reward", f"{self.mean_reward:.4g} (target {target})"),
            ("distance to R/Z", "; ".join(distance) or "unknown"),
        ]


@torch.no_grad()
def policy_edges(graph: Graph, policy: FlowPolicy) -> Tensor:
    """log P_F of every edge, ``[E]``, float64."""
    parts = []
    unique, row_E = graph.parent_E.unique(return_inverse=True)
    for start in range(0, len(unique), 8192):
        parts.append(policy.outputs(graph.env, graph.state_NC[unique[start : start + 8192]]).log_pf_NA)
    log_pf = torch.cat(parts)[row_E, graph.action_E].double()
    return log_pf


def report(
    env: Environment,
    policy: FlowPolicy,
    samples: int,
    modes_found: int,
    generator: torch.Generator,
    graph: Graph | None = None,
) -> FlowReport:
    """Measures a policy: exactly if the states can be listed, otherwise on fresh samples and random objects.

    Args:
        env: what is built.
        policy: the trained network.
        samples: number of samples among which modes were counted.
        modes_found: different modes among them.
        generator: of random numbers.
        graph: the listed states; default: `None`, listed here if possible.
    """
    if graph is None and countable(env):
        graph = listed(env)
    table = reward_table(env, graph)
    if graph is not None:
        log_p_N = exact.drawn_by(graph, policy_edges(graph, policy))
        tv = exact.total_variation(log_p_N, exact.target(graph))
        log_p, log_R = log_p_N[graph.last_N], graph.log_R_N[graph.last_N]
        mean_reward = float((log_p + log_R).exp().sum())
    else:
        tv, (log_p, log_R) = None, tested(env, policy, generator)
        drawn = sample(env, lambda state: policy.logits(env, state), DRAWN, generator).last_BC
        mean_reward = float(env.log_partial(drawn).exp().mean())
    modes = env.count_modes() if table is None else round(float(table.count_K[table.mode_K].sum()))
    return FlowReport(
        samples=samples,
        modes_found=modes_found,
        perfect_modes=None if table is None else expected_modes(table, samples),
        modes=modes,
        mean_reward=mean_reward,
        target_mean_reward=None if table is None else math.exp(expected_log_reward(table)),
        tv=tv,
        spearman=spearman(log_p, log_R),
        slope=slope(log_p, log_R),
        exact=graph is not None,
    )


@torch.no_grad()
def tested(env: Environment, policy: FlowPolicy, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Log probabilities of random objects, each estimated from backward walks, and their log rewards."""
    object_XC = env.uniform(TESTED, generator)
    walks = walk_back(env, object_XC.repeat_interleave(WALKS, 0), generator)
    states, mask_BT = walks.state_BSC, walks.mask_BT
    flat = states[:, :-1][mask_BT]
    log_pf = policy.outputs(env, flat).log_pf_NA.double().gather(1, walks.action_BT[mask_BT][:, None])[:, 0]
    log_pb = -env.backward_mask(states[:, 1:][mask_BT]).sum(1).double().log()
    ratio_BT = torch.zeros(mask_BT.shape, dtype=torch.float64).masked_scatter(mask_BT, log_pf - log_pb)
    log_p = ratio_BT.sum(1).view(TESTED, WALKS).logsumexp(1) - math.log(WALKS)
    return log_p, env.log_partial(object_XC)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The rank correlation of two vectors; equal values share their mean rank. `None`: one of them is constant."""
    fine = torch.isfinite(a) & torch.isfinite(b)
    return _correlation(_ranks(a[fine]), _ranks(b[fine]))


def slope(log_p: Tensor, log_R: Tensor) -> float | None:
    """The least-squares slope of log probability over log reward; `None`: all rewards are equal."""
    fine = torch.isfinite(log_p) & torch.isfinite(log_R)
    x, y = log_R[fine] - log_R[fine].mean(), log_p[fine] - log_p[fine].mean()
    square = float((x * x).sum())
    return float((x * y).sum()) / square if square > 1e-12 else None


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def _correlation(a: Tensor, b: Tensor) -> float | None:
    if len(a) < 2:
        return None
    x, y = a - a.mean(), b - b.mean()
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 1e-12 else None

"""All states and edges of a small environment. Shapes: N states, C columns of a state, E edges, X finished objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment

MOST_STATES = 300_000


@dataclass(frozen=True)
class Graph:
    """The states and edges of an environment, listed.

    Args:
        env: the environment.
        state_NC: the states; the first one is the root.
        level_N: steps of the longest way from the root.
        parent_E, child_E, action_E: the edges, sorted by the level of the parent.
        last_N: which states are finished objects.
        log_R_N: log reward of finished objects, −inf for other states.

    Example:
        >>> from pondera.flows.environments.hyper_grid import HyperGrid
        >>> len(listed(HyperGrid(2, side=3)).state_NC)
        18
    """

    env: Environment
    state_NC: Tensor
    level_N: Tensor
    parent_E: Tensor
    child_E: Tensor
    action_E: Tensor
    last_N: Tensor
    log_R_N: Tensor

    @cached_property
    def layers(self) -> list[slice]:
        """The edges whose parents have the same level, as slices in the order of levels."""
        counts = torch.bincount(self.level_N[self.parent_E]).tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @cached_property
    def by_child(self) -> list[Tensor]:
        """The edges whose children have the same level, in the order of levels."""
        level_E = self.level_N[self.child_E]
        return [(level_E == level).nonzero()[:, 0] for level in range(1, int(self.level_N.max()) + 1)]


def countable(env: Environment, most: int = MOST_STATES) -> bool:
    """Whether all states can be listed."""
    return env.count_states() <= most


def listed(env: Environment, most: int = MOST_STATES) -> Graph:
    """Lists all states that can be reached, with their edges.

    Raises:
        UserError: there are more states than `most`, or unfinished states without actions.
    """
    if not countable(env, most):
        raise UserError(f"{env!r} has {env.count_states():,} states; at most {most:,} can be listed; make it smaller")
    states, keys = _reached(env)
    order = keys.argsort()
    edges = []
    for start in range(0, len(states), 8192):
        row, action = env.forward_mask(states[start : start + 8192]).nonzero(as_tuple=True)
        child = env.step(states[start : start + 8192][row], action)
        edges.append((row + start, order[torch.searchsorted(keys[order], env.key(child))], action))
    parent_E, child_E, action_E = (torch.cat(parts) for parts in zip(*edges, strict=True))
    level_N = _levels(len(states), parent_E, child_E)
    last_N = env.finished(states)
    stuck = ~last_N & (torch.bincount(parent_E, minlength=len(states)) == 0)
    if stuck.any():
        raise UserError(f"{env!r}: the state {states[stuck][0].tolist()} is not finished and has no action")
    by_level = level_N[parent_E].argsort(stable=True)
    log_R_N = torch.where(last_N, env.log_partial(states), -torch.inf)
    return Graph(env, states, level_N, parent_E[by_level], child_E[by_level], action_E[by_level], last_N, log_R_N)


def _reached(env: Environment) -> tuple[Tensor, Tensor]:
    """All states, in the order in which they are first reached, and their keys."""
    found, keys = [env.start(1)], env.key(env.start(1))
    front = found[0]
    every = [keys]
    while len(front):
        parts = []
        for start in range(0, len(front), 8192):
            row, action = env.forward_mask(front[start : start + 8192]).nonzero(as_tuple=True)
            parts.append(_unique(env, env.step(front[start : start + 8192][row], action)))
        front = _unique(env, torch.cat(parts))
        front = front[~torch.isin(env.key(front), keys)]
        every.append(env.key(front))
        keys = torch.cat([keys, every[-1]])
        found.append(front)
    return torch.cat(found), keys


def _unique(env: Environment, state_NC: Tensor) -> Tensor:
    if not len(state_NC):
        return state_NC
    key, inverse = torch.unique(env.key(state_NC), return_inverse=True)
    place = torch.zeros(len(key), dtype=torch.long).scatter_(0, inverse, torch.arange(len(inverse)))
    return state_NC[place]


def _levels(count: int, parent_E: Tensor, child_E: Tensor) -> Tensor:
    level_N = torch.zeros(count, dtype=torch.long)
    for _ in range(count):
        higher = level_N.scatter_reduce(0, child_E, level_N[parent_E] + 1, "amax")
        if torch.equal(higher, level_N):
            return level_N
        level_N = higher
    raise UserError("the environment has a cycle: a state can be reached from itself")


def sum_by(log_E: Tensor, index_E: Tensor, count: int) -> Tensor:
    """log Σ exp of the entries of each index; −inf where there are none."""
    top_N = log_E.new_full((count,), -torch.inf).scatter_reduce(0, index_E, log_E, "amax")
    safe_N = top_N.nan_to_num(neginf=0.0)
    total_N = log_E.new_zeros(count).index_add(0, index_E, (log_E - safe_N[index_E]).exp())
    return total_N.log() + safe_N

"""Samplers: trajectories forward from the root, and backward from finished objects.

Shapes: B trajectories, T transitions, S = T + 1 states, C columns of a state, N rows in progress, A actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pondera.flows.environments.base import Environment


class Trajectories(NamedTuple):
    """A batch of trajectories.

    Args:
        state_BSC: states; after the end, the finished object is repeated.
        action_BT: actions; 0 after the end.
        mask_BT: which transitions are part of the trajectory.
    """

    state_BSC: Tensor
    action_BT: Tensor
    mask_BT: Tensor

    @property
    def last_BC(self) -> Tensor:
        """The finished objects."""
        return self.state_BSC[:, -1]


Logits = Callable[[Tensor], Tensor]
"""From states ``[N, C]`` to logits ``[N, A]``; those of impossible actions are not read."""


@torch.no_grad()
def sample(
    env: Environment,
    logits: Logits,
    count: int,
    generator: torch.Generator,
    epsilon: float = 0.0,
    temperature: float = 1.0,
) -> Trajectories:
    """Draws trajectories from a policy. Rows that have ended are left out of the later steps.

    Args:
        env: what is built.
        logits: the policy.
        count: number of trajectories.
        generator: of random numbers.
        epsilon: share of uniformly random actions.
        temperature: of the policy; above 1 it is flatter.
    """
    states, rows = [env.start(count)], torch.arange(count)
    actions, masks = [], []
    while len(rows):
        whole = len(rows) == count  # no row has ended: nothing to gather or scatter
        here_NC = states[-1] if whole else states[-1][rows]
        allowed_NA = env.forward_mask(here_NC)
        logits_NA = logits(here_NC) if temperature == 1 else logits(here_NC) / temperature
        p_NA = logits_NA.masked_fill(~allowed_NA, -torch.inf).softmax(1)
        if epsilon:
            p_NA = (1 - epsilon) * p_NA + epsilon * allowed_NA / allowed_NA.sum(1, keepdim=True)
        action_N = torch.multinomial(p_NA, 1, generator=generator)[:, 0]
        after_NC = env.step(here_NC, action_N)
        if whole:
            states.append(after_NC)
            actions.append(action_N)
            masks.append(torch.ones_like(action_N, dtype=torch.bool))
        else:
            states.append(states[-1].index_put((rows,), after_NC))
            actions.append(torch.zeros(count, dtype=torch.long).index_put((rows,), action_N))
            masks.append(torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True))
        rows = rows[~env.finished(after_NC)]
    return Trajectories(torch.stack(states, 1), torch.stack(actions, 1), torch.stack(masks, 1))


@torch.no_grad()
def walk_back(
    env: Environment, object_BC: Tensor, generator: torch.Generator, logits: Logits | None = None
) -> Trajectories:
    """Draws trajectories that end in given objects, from the backward policy.

    Args:
        env: what is built.
        object_BC: finished objects.
        generator: of random numbers.
        logits: the backward policy; default: `None`, uniform over parents.
    """
    count, rows = len(object_BC), torch.arange(len(object_BC))
    states, actions = [object_BC], []
    length_B = torch.zeros(count, dtype=torch.long)
    while True:
        here_NC = states[-1][rows]
        back_NA = env.backward_mask(here_NC)
        going = back_NA.any(1)  # the root has no parents
        rows, here_NC, back_NA = rows[going], here_NC[going], back_NA[going]
        if not len(rows):
            break
        weight_NA = back_NA.float()
        if logits is not None:
            weight_NA = logits(here_NC).masked_fill(~back_NA, -torch.inf).softmax(1)
        action_N = torch.multinomial(weight_NA, 1, generator=generator)[:, 0]
        actions.append(torch.zeros(count, dtype=torch.long).index_put((rows,), action_N))
        states.append(states[-1].index_put((rows,), env.undo(here_NC, action_N)))
        length_B[rows] += 1
    longest = len(actions)
    step_T = torch.arange(longest)
    mask_BT = step_T < length_B[:, None]
    place_BS = (length_B[:, None] - torch.arange(longest + 1)).clamp_min(0)  # from the root forward
    state_BSC = torch.stack(states, 1)
    state_BSC = state_BSC.gather(1, place_BS[..., None].expand(-1, -1, state_BSC.shape[2]))
    back_BT = torch.stack(actions, 1)
    action_BT = back_BT.gather(1, (length_B[:, None] - 1 - step_T).clamp_min(0)) * mask_BT
    return Trajectories(state_BSC, action_BT, mask_BT)


class Replay:
    """Keeps the different objects of highest reward, and draws from them uniformly.

    Args:
        size: number of objects.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.object_NC = torch.zeros(0, 0, dtype=torch.long)
        self.log_R_N = torch.zeros(0, dtype=torch.float64)

    def add(self, object_BC: Tensor, log_R_B: Tensor) -> None:
        """Adds finished objects with their log rewards."""
        every = torch.cat([self.object_NC, object_BC]) if len(self.object_NC) else object_BC
        log_R = torch.cat([self.log_R_N, log_R_B])
        unique, inverse = torch.unique(every, dim=0, return_inverse=True)
        best = torch.empty(len(unique), dtype=torch.float64).scatter_(0, inverse, log_R)
        order = best.argsort(descending=True, stable=True)[: self.size]
        self.object_NC, self.log_R_N = unique[order], best[order]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random objects, with replacement; fewer than `count` if it is empty (none)."""
        if not len(self.object_NC):
            return self.object_NC
        return self.object_NC[torch.randint(len(self.object_NC), (count,), generator=generator)]


def joined(first: Trajectories, second: Trajectories) -> Trajectories:
    """Two batches as one; the shorter one is padded."""
    length = max(first.mask_BT.shape[1], second.mask_BT.shape[1])
    parts = []
    for one in (first, second):
        more = length - one.mask_BT.shape[1]
        state = torch.cat([one.state_BSC, one.state_BSC[:, -1:].expand(-1, more, -1)], 1)
        action, mask = (torch.nn.functional.pad(part, (0, more)) for part in (one.action_BT, one.mask_BT))
        parts.append((state, action, mask))
    return Trajectories(*(torch.cat(pair) for pair in zip(*parts, strict=True)))

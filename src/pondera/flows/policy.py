"""The network of a GFlowNet. Shapes: N states, D features, A actions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pondera.flows.environments.base import Environment


class Outputs(NamedTuple):
    """What the network says of states.

    Args:
        log_pf_NA: log-probabilities of the actions, −inf for impossible ones; for objectives of edges, log flows of the edges.
        log_F_N: log flows.
        log_pb_NA: log-probabilities of the actions that led here; −inf for others.
    """

    log_pf_NA: Tensor
    log_F_N: Tensor
    log_pb_NA: Tensor


class FlowPolicy(nn.Module):
    """A perceptron with a head for actions, one for the flow of a state and, if it is learned, one for the backward policy.

    Args:
        env: what is built.
        width, layers: of the hidden layers.
        learned_backward: learn the backward policy; otherwise it is uniform over parents.

    Example:
        >>> from pondera.flows.environments.hyper_grid import HyperGrid
        >>> env = HyperGrid(2, side=3)
        >>> FlowPolicy(env, 8, 1, False).outputs(env, env.start(4)).log_pf_NA.shape
        torch.Size([4, 3])
    """

    def __init__(self, env: Environment, width: int, layers: int, learned_backward: bool) -> None:
        super().__init__()
        sizes = [env.width, *[width] * layers]
        self.actions, self.learned_backward = env.actions, learned_backward
        hidden = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), nn.LeakyReLU())]
        self.hidden = nn.Sequential(*hidden)
        self.head = nn.Linear(width, env.actions * (2 if learned_backward else 1) + 1)
        self.log_z = nn.Parameter(torch.zeros(()))

    def logits(self, env: Environment, state_NC: Tensor) -> Tensor:
        """Unmasked numbers of the actions, ``[N, A]``: before a softmax, or log flows of edges."""
        return self.head(self.hidden(env.features(state_NC)))[:, : self.actions]

    def outputs(self, env: Environment, state_NC: Tensor) -> Outputs:
        """The heads, with impossible actions masked; at finished states no action is possible, and log P_F is not defined."""
        found = self.head(self.hidden(env.features(state_NC)))
        allowed = env.forward_mask(state_NC)
        allowed = allowed | ~allowed.any(1, keepdim=True)  # a softmax of nothing would be NaN
        log_pf_NA = found[:, : self.actions].masked_fill(~allowed, -torch.inf).log_softmax(1)
        return Outputs(log_pf_NA, found[:, -1], self._backward(env, state_NC, found))

    def _backward(self, env: Environment, state_NC: Tensor, found: Tensor) -> Tensor:
        back = env.backward_mask(state_NC)
        if not self.learned_backward:
            return (-back.sum(1, keepdim=True).to(found.dtype).log()).expand(back.shape).masked_fill(~back, -torch.inf)
        shown = back | ~back.any(1, keepdim=True)
        log_pb = found[:, self.actions : 2 * self.actions].masked_fill(~shown, -torch.inf).log_softmax(1)
        return log_pb.masked_fill(~back, -torch.inf)

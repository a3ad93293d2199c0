"""The numbers of a batch of trajectories that an objective needs, from one pass of the network over all their states.

Shapes: B trajectories, T transitions, S = T + 1 states, C columns of a state, N states of all trajectories, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.flows.environments.base import Environment
from pondera.flows.policy import FlowPolicy
from pondera.flows.sampling import Trajectories
from pondera.methods.objective.base import FlowBatch


def log_rewards(env: Environment, object_BC: Tensor, exponent: float, least: float) -> Tensor:
    """Log rewards of finished objects to the power of an exponent, at least `least`.

    Raises:
        UserError: a reward is NaN or infinite.
    """
    log_R_B = env.log_partial(object_BC)
    bad = torch.isnan(log_R_B) | (log_R_B == torch.inf)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise UserError(f"{env!r}: the object {object_BC[at].tolist()} has the log reward {log_R_B[at].item()}")
    return (exponent * log_R_B).clamp_min(least)


def score(
    env: Environment,
    policy: FlowPolicy,
    batch: Trajectories,
    needs: str,
    exponent: float = 1.0,
    least: float = -30.0,
    per_step: float = 0.0,
) -> FlowBatch:
    """Runs the policy on all states of the trajectories.

    Args:
        env: what is built.
        policy: the network.
        batch: trajectories.
        needs: what the objective needs, see `pondera.methods.objective.base.Objective.needs`.
        exponent: of the reward.
        least: lowest log reward.
        per_step: nats that are added to log Z and log flows for each remaining step.
    """
    states, mask_BT = batch.state_BSC, batch.mask_BT
    log_R_B = log_rewards(env, batch.last_BC, exponent, least).float()
    if needs == "edges":
        return _edges(env, policy, batch, log_R_B)
    inside_BS = torch.nn.functional.pad(mask_BT, (1, 0), value=True)  # the states up to the finished object
    rows_NC = states[inside_BS]
    found = policy.outputs(env, rows_NC)
    zero_BS = torch.zeros(inside_BS.shape)

    def spread(value_N: Tensor) -> Tensor:
        return zero_BS.masked_scatter(inside_BS, value_N)

    action_N = torch.nn.functional.pad(batch.action_BT, (0, 1))[inside_BS]
    came_N = torch.nn.functional.pad(batch.action_BT, (1, 0))[inside_BS]
    log_pf_BT = spread(found.log_pf_NA.gather(1, action_N[:, None])[:, 0])[:, :-1]
    log_pb_BT = spread(found.log_pb_NA.gather(1, came_N[:, None])[:, 0])[:, 1:]
    if needs == "log_z":
        log_z = policy.log_z + per_step * env.longest
        return FlowBatch(mask_BT, log_R_B, log_pf_BT, log_pb_BT, log_z.expand(inside_BS.shape))
    log_F_N = found.log_F_N
    if per_step:
        log_F_N = log_F_N + per_step * env.remaining(rows_NC)
    partial_BS = None
    if needs == "partial":
        partial_BS = spread((exponent * env.log_partial(rows_NC)).clamp_min(least).float())
    return FlowBatch(mask_BT, log_R_B, log_pf_BT, log_pb_BT, spread(log_F_N), partial_BS)


def _edges(env: Environment, policy: FlowPolicy, batch: Trajectories, log_R_B: Tensor) -> FlowBatch:
    """Log flows of the edges into and out of the states after each transition."""
    mask_BT = batch.mask_BT
    state_NC = batch.state_BSC[:, 1:][mask_BT]
    out_NA = policy.logits(env, state_NC).masked_fill(~env.forward_mask(state_NC), -torch.inf)
    back_NA = env.backward_mask(state_NC)
    row, action = back_NA.nonzero(as_tuple=True)
    parent = policy.logits(env, env.undo(state_NC[row], action)).gather(1, action[:, None])[:, 0]
    in_NA = torch.full(back_NA.shape, -torch.inf).masked_scatter(back_NA, parent)
    last_N = env.finished(state_NC)
    reward_N = log_R_B[:, None].expand(mask_BT.shape)[mask_BT]
    first = torch.arange(env.actions) == 0
    out_NA = torch.where(last_N[:, None], torch.where(first, reward_N[:, None], -torch.inf), out_NA)
    none_BTA = torch.full((*mask_BT.shape, env.actions), -torch.inf)
    wide = mask_BT[..., None].expand(none_BTA.shape)
    return FlowBatch(
        mask_BT,
        log_R_B,
        log_in_BTP=none_BTA.masked_scatter(wide, in_NA),
        log_out_BTC=none_BTA.masked_scatter(wide, out_NA),
    )

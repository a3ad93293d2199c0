"""Samplers draw what the exact law says, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pondera.core import spec
from pondera.flows import exact
from pondera.flows.environments.base import Environment
from pondera.flows.graph import listed
from pondera.flows.policy import FlowPolicy
from pondera.flows.report import policy_edges
from pondera.flows.sampling import Replay, Trajectories, joined, sample, walk_back

FORMS = ["Set(5, choose=3)", "Bit(4, word=2, modes=2)", "HyperGrid(2, side=3)", "Spans(('a', 'b', 'ab'), longest=3)"]
COUNT = 20_000


def policy_of(env: Environment, learned: bool = False) -> FlowPolicy:
    torch.manual_seed(0)
    policy = FlowPolicy(env, 16, 1, learned)
    with torch.no_grad():
        policy.head.weight.mul_(4)  # away from uniform
    return policy


def check_valid(env: Environment, batch: Trajectories) -> None:
    """Every transition is possible both ways, and every trajectory runs from the root to a finished object."""
    assert torch.equal(batch.state_BSC[:, 0], env.start(len(batch.mask_BT))) and env.finished(batch.last_BC).all()
    before, after = batch.state_BSC[:, :-1][batch.mask_BT], batch.state_BSC[:, 1:][batch.mask_BT]
    action = batch.action_BT[batch.mask_BT]
    assert env.forward_mask(before).gather(1, action[:, None]).all()
    assert env.backward_mask(after).gather(1, action[:, None]).all()
    assert torch.equal(env.step(before, action), after) and torch.equal(env.undo(after, action), before)
    assert not (batch.mask_BT[:, 1:] & ~batch.mask_BT[:, :-1]).any(), "the mask is True first, then False"
    after_end = batch.state_BSC[:, 1:][~batch.mask_BT]
    assert env.finished(after_end).all()


def frequencies(env: Environment, states: Tensor, object_BC: Tensor) -> Tensor:
    keys = env.key(states)
    order = keys.argsort()
    place = order[torch.searchsorted(keys[order], env.key(object_BC))]
    return torch.bincount(place, minlength=len(states)).double() / len(object_BC)


@pytest.mark.parametrize("form", FORMS)
def test_samples_follow_the_exact_law(form: str):
    env = spec.build(form, "environment")
    graph, policy = listed(env), policy_of(env)
    batch = sample(env, lambda state: policy.logits(env, state), COUNT, torch.Generator().manual_seed(0))
    check_valid(env, batch)
    law = exact.drawn_by(graph, policy_edges(graph, policy)).exp()
    found = frequencies(env, graph.state_NC, batch.last_BC)
    assert (found - law).abs().sum() / 2 < 1.5 * (law / COUNT).sqrt().sum() / 2
    length = exact.mean_length(graph, policy_edges(graph, policy))
    assert batch.mask_BT.sum(1).double().mean().item() == pytest.approx(length, abs=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_random_actions_and_temperature_change_the_law_as_they_should(form: str):
    env = spec.build(form, "environment")
    graph, policy = listed(env), policy_of(env)
    logits = lambda state: policy.logits(env, state)  # noqa: E731
    uniform = -torch.bincount(graph.parent_E, minlength=len(graph.state_NC)).double().log()[graph.parent_E]
    random = exact.drawn_by(graph, uniform).exp()
    for options in ({"epsilon": 1.0}, {"temperature": 1e6}):
        batch = sample(env, logits, COUNT, torch.Generator().manual_seed(1), **options)
        found = frequencies(env, graph.state_NC, batch.last_BC)
        assert (found - random).abs().sum() / 2 < 1.5 * (random / COUNT).sqrt().sum() / 2
    mixed = (0.7 * policy_edges(graph, policy).exp() + 0.3 * uniform.exp()).log()
    law = exact.drawn_by(graph, mixed).exp()
    batch = sample(env, logits, COUNT, torch.Generator().manual_seed(2), epsilon=0.3)
    assert (frequencies(env, graph.state_NC, batch.last_BC) - law).abs().sum() / 2 < 0.02


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_walks_back_are_drawn_from_the_backward_policy(form: str, learned: bool):
    env = spec.build(form, "environment")
    graph, policy = listed(env), policy_of(env, learned)
    last = graph.state_NC[graph.last_N]
    which = last[torch.randint(len(last), (COUNT,), generator=torch.Generator().manual_seed(0))]
    back = (lambda state: policy.outputs(env, state).log_pb_NA) if learned else None
    batch = walk_back(env, which, torch.Generator().manual_seed(1), back)
    check_valid(env, batch)
    assert torch.equal(batch.last_BC, which)
    log_pb = policy.outputs(env, graph.state_NC).log_pb_NA[graph.child_E, graph.action_E].detach().double()
    exact.check_backward(graph, log_pb)
    # The last step back from one object follows the probabilities of its parents.
    one = int(torch.bincount(graph.child_E).masked_fill(~graph.last_N, 0).argmax())
    rows = env.key(which) == env.key(graph.state_NC[one : one + 1])
    final = batch.action_BT[rows].gather(1, batch.mask_BT[rows].sum(1, keepdim=True) - 1)[:, 0]
    edges = graph.child_E == one
    for action, probability in zip(graph.action_E[edges].tolist(), log_pb[edges].exp().tolist(), strict=True):
        share = (final == action).double().mean().item()
        assert share == pytest.approx(probability, abs=4 * (0.25 / int(rows.sum())) ** 0.5)


def test_replay_keeps_the_best_different_objects():
    replay = Replay(2)
    assert len(replay.draw(3, torch.Generator())) == 0
    replay.add(torch.tensor([[0, 1], [1, 1], [0, 1]]), torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64))
    replay.add(torch.tensor([[1, 0], [0, 0]]), torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert replay.object_NC.tolist() == [[1, 1], [1, 0]] and replay.log_R_N.tolist() == [3.0, 2.0]
    drawn = replay.draw(50, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in drawn.tolist()} == {(1, 1), (1, 0)}


def test_joined_batches_are_still_trajectories():
    env = spec.build(FORMS[3], "environment")
    uniform = lambda state: torch.zeros(len(state), env.actions)  # noqa: E731
    short = sample(env, lambda state: torch.tensor([0.0, 0.0, 0.0, 1e9]).expand(len(state), -1), 2, torch.Generator())
    long = sample(env, uniform, 30, torch.Generator().manual_seed(0))
    assert short.mask_BT.shape[1] == 1 < long.mask_BT.shape[1]
    for both in (joined(short, long), joined(long, short)):
        check_valid(env, both)
        assert len(both.mask_BT) == 32

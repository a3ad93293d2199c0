"""Exact laws: against brute force over all ways, and as optimum of every objective with α."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.flows import exact
from pondera.flows.environments.set import Set
from pondera.flows.graph import Graph, listed
from pondera.flows.perfect import expected_log_reward, expected_modes, reward_table
from pondera.methods.objective.common.offset import log_odds
from pondera.methods.objective.common.stop_form import stop_flows
from pondera.methods.objective.db import detailed_balance
from pondera.methods.objective.fl_db import forward_looking_balance
from pondera.methods.objective.fm import flow_matching
from pondera.methods.objective.sub_tb import sub_trajectory_balance
from pondera.methods.objective.tb import trajectory_balance

TABLE = (
    "Table([('s','a'), ('s','b'), ('a','b'), ('a','x'), ('b','x'), ('b','y'), ('a','c'), ('c','y'), ('c','z')], "
    "{'x': 1.0, 'y': 0.25, 'z': 3.0})"
)
UNGRADED = [TABLE, "Spans(('a', 'b', 'ab', 'ba'), longest=4)", "HyperGrid(2, side=4)"]
GRADED = ["Set(6, choose=3)", "Bit(4, word=2, modes=2)"]
ALPHAS = (0.1, 0.5, 0.7, 0.9)


def graph_of(form: str) -> Graph:
    return listed(spec.build(form, "environment"))


def random_backward(graph: Graph, seed: int = 0) -> Tensor:
    """A backward policy that is not uniform."""
    weight = torch.rand(len(graph.child_E), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    total = torch.zeros(len(graph.level_N), dtype=torch.float64).index_add(0, graph.child_E, weight)
    return (weight / total[graph.child_E]).log()


def ways(graph: Graph) -> Iterator[list[int]]:
    """All ways from the root to finished objects, as lists of edges."""
    after = defaultdict(list)
    for edge, parent in enumerate(graph.parent_E.tolist()):
        after[parent].append(edge)
    stack: list[tuple[int, list[int]]] = [(0, [])]
    while stack:
        node, way = stack.pop()
        if graph.last_N[node]:
            yield way
        for edge in after[node]:
            stack.append((int(graph.child_E[edge]), [*way, edge]))


@pytest.mark.parametrize("form", UNGRADED + GRADED)
def test_laws_are_sums_over_all_ways(form: str):
    graph = graph_of(form)
    log_pb = random_backward(graph)
    _, log_pf = exact.optimum(graph, log_pb, 0.7)
    drawn, back, count, tilted = (torch.zeros(len(graph.level_N), dtype=torch.float64) for _ in range(4))
    length = 0.0
    for way in ways(graph):
        last = graph.child_E[way[-1]]
        forward, backward = log_pf[way].sum().exp(), log_pb[way].sum().exp()
        drawn[last] += forward
        back[last] += backward
        count[last] += 1
        tilted[last] += backward * (0.3 / 0.7) ** len(way)
        length += float(forward) * len(way)
    last = graph.last_N
    torch.testing.assert_close(exact.drawn_by(graph, log_pf).exp(), drawn, rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.path_counts(graph).exp()[last], count[last], rtol=1e-12, atol=0)
    torch.testing.assert_close(back[last], torch.ones(int(last.sum()), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(exact.tilt(graph, log_pb, 0.7).exp()[last], tilted[last], rtol=0, atol=1e-12)
    assert exact.mean_length(graph, log_pf) == pytest.approx(length)
    assert drawn.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("form", UNGRADED + GRADED)
def test_the_optimum_draws_the_reward_times_the_tilt(form: str, alpha: float):
    graph, log_pb = graph_of(form), random_backward(graph_of(form), 1)
    for exit_edge in (False, True):
        flow, log_pf = exact.optimum(graph, log_pb, alpha, exit_edge)
        drawn = exact.drawn_by(graph, log_pf)
        wanted = graph.log_R_N + exact.tilt(graph, log_pb, alpha)
        torch.testing.assert_close(drawn.exp(), (wanted - wanted.logsumexp(0)).exp(), rtol=0, atol=1e-12)
        assert flow[0].item() == pytest.approx(wanted.logsumexp(0).item() - exit_edge * log_odds(alpha), abs=1e-12)
        repaired = drawn - exact.tilt(graph, log_pb, alpha)
        assert exact.total_variation(repaired - repaired.logsumexp(0), exact.target(graph)) < 1e-12
        if alpha == 0.5 or graph.env.graded:
            assert exact.total_variation(drawn, exact.target(graph)) < 1e-12
        else:
            assert exact.total_variation(drawn, exact.target(graph)) > 0.01
        inflow = torch.zeros(len(flow), dtype=torch.float64)
        inflow = inflow.index_add(0, graph.child_E, (flow[graph.parent_E] + log_pf).exp())
        torch.testing.assert_close(alpha * inflow[1:], (1 - alpha) * flow.exp()[1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", GRADED)
def test_with_one_length_alpha_moves_only_the_flows_by_a_known_amount(form: str):
    graph = graph_of(form)
    log_pb, env = random_backward(graph, 2), graph.env
    plain, log_pf = exact.optimum(graph, log_pb)
    for alpha in (0.2, 0.9):
        for exit_edge in (False, True):
            flow, moved = exact.optimum(graph, log_pb, alpha, exit_edge)
            torch.testing.assert_close(moved, log_pf, rtol=0, atol=1e-12)
            edges = (env.remaining(graph.state_NC) + int(exit_edge)).double()
            torch.testing.assert_close(flow, plain - edges * log_odds(alpha), rtol=0, atol=1e-11)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("form", UNGRADED + GRADED)
def test_every_objective_is_zero_at_the_optimum(form: str, alpha: float):
    graph, log_pb = graph_of(form), random_backward(graph_of(form), 3)
    some = list(ways(graph))[::7][:60]
    longest = max(map(len, some))
    mask = torch.arange(longest) < torch.tensor([len(way) for way in some])[:, None]
    edge = torch.tensor([way + [0] * (longest - len(way)) for way in some])
    node = torch.nn.functional.pad(graph.child_E[edge], (1, 0))
    log_R = graph.log_R_N[torch.tensor([graph.child_E[way[-1]] for way in some])]
    partial = graph.env.log_partial(graph.state_NC[node.flatten()]).view(node.shape)
    for exit_edge in (False, True):
        flow, log_pf = exact.optimum(graph, log_pb, alpha, exit_edge)
        args = (log_pf[edge], log_pb[edge])
        rest = (log_R, mask, alpha, exit_edge)
        found = [
            trajectory_balance(*args, flow[0], *rest),
            detailed_balance(*args, flow[node], *rest),
            sub_trajectory_balance(*args, flow[node], *rest)[0],
            sub_trajectory_balance(*args, flow[node], *rest, ends_BS=torch.rand(node.shape) < 0.5)[0],
            forward_looking_balance(*args, flow[node] - partial, partial, *rest),
        ]
        assert all(residual.abs().max() < 1e-10 for residual in found)
        into = edge_table(graph, flow[graph.parent_E] + log_pf, graph.child_E)
        out = edge_table(graph, flow[graph.parent_E] + log_pf, graph.parent_E)
        out[graph.last_N, 0] = graph.log_R_N[graph.last_N] - exit_edge * log_odds(alpha)
        assert flow_matching(into[1:], out[1:], alpha).abs().max() < 1e-10


def edge_table(graph: Graph, log_E: Tensor, node_E: Tensor) -> Tensor:
    """The edges of each node in a row."""
    width = int(torch.bincount(node_E).max())
    table, used = torch.full((len(graph.level_N), width), -math.inf, dtype=torch.float64), defaultdict(int)
    for value, node in zip(log_E, node_E.tolist(), strict=True):
        table[node, used[node]] = value
        used[node] += 1
    return table


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("form", UNGRADED[1:])
def test_the_stop_form_is_zero_at_the_optimum_with_and_without_a_mask_of_ends(form: str, alpha: float):
    """All states can stop: their flows are R / (c · P(stop)), and the stop transitions are left out."""
    graph, log_pb = graph_of(form), random_backward(graph_of(form), 4)
    stop = graph.last_N[graph.child_E]
    log_pb = log_pb.masked_fill(stop, 0.0)
    flow, log_pf = exact.optimum(graph, log_pb, alpha)
    log_stop = torch.zeros(len(flow), dtype=torch.float64)
    log_stop[graph.parent_E[stop]] = log_pf[stop]
    log_R = graph.env.log_partial(graph.state_NC)
    some = [way[:-1] for way in list(ways(graph))[::5] if len(way) > 1][:50]
    longest = max(map(len, some))
    mask = torch.arange(longest) < torch.tensor([len(way) for way in some])[:, None]
    edge = torch.tensor([way + [0] * (longest - len(way)) for way in some])
    node = torch.nn.functional.pad(graph.child_E[edge], (1, 0))
    flows = stop_flows(log_R[node], log_stop[node], alpha)
    inside = torch.nn.functional.pad(mask, (1, 0), value=True)
    torch.testing.assert_close(flows[inside], flow[node][inside], rtol=0, atol=1e-10)
    last = flows.gather(1, mask.sum(1, keepdim=True))[:, 0]
    assert detailed_balance(log_pf[edge], log_pb[edge], flows, last, mask, alpha).abs().max() < 1e-10
    for ends in (None, torch.rand(node.shape) < 0.5):
        residual, _ = sub_trajectory_balance(log_pf[edge], log_pb[edge], flows, last, mask, alpha, ends_BS=ends)
        assert residual.abs().max() < 1e-10


def test_a_backward_policy_that_does_not_sum_to_one_is_caught_and_draws_reward_times_ways():
    graph = graph_of("Spans()")
    wrong = torch.zeros(len(graph.child_E), dtype=torch.float64)
    with pytest.raises(UserError, match=r"the probabilities of the parents of state .* sum to 3, not to 1"):
        exact.optimum(graph, wrong)
    _, log_pf = exact.optimum(graph, wrong, check=False)
    drawn, counted = exact.drawn_by(graph, log_pf), graph.log_R_N + exact.path_counts(graph)
    torch.testing.assert_close(drawn.exp(), (counted - counted.logsumexp(0)).exp(), rtol=0, atol=1e-12)
    assert exact.total_variation(drawn, exact.target(graph)) > 0.2


def test_the_tilt_of_the_span_toy_is_what_was_measured():
    graph = graph_of("Spans()")
    log_pb = exact.uniform_backward(graph)
    found = {}
    for alpha in (0.3, 0.5, 0.7, 0.9):
        _, log_pf = exact.optimum(graph, log_pb, alpha)
        found[alpha] = (
            exact.total_variation(exact.drawn_by(graph, log_pf), exact.target(graph)),
            exact.mean_length(graph, log_pf),
        )
    assert [round(tv, 3) for tv, _ in found.values()] == [0.199, 0.0, 0.310, 0.829]
    lengths = [length for _, length in found.values()]
    assert lengths == sorted(lengths, reverse=True)


def test_probabilities_that_do_not_sum_to_one_are_refused():
    graph = graph_of(TABLE)
    with pytest.raises(UserError, match=r"the probabilities of the actions at state \[0\] sum to 2"):
        exact.drawn_by(graph, torch.zeros(len(graph.parent_E)))


def test_forbidden_objects_are_never_drawn():
    graph = graph_of("Table([('s','a'), ('s','b'), ('a','x'), ('a','y'), ('b','z')], {'x': 1.0, 'y': 0.0, 'z': 1.0})")
    _, log_pf = exact.optimum(graph, exact.uniform_backward(graph), 0.7)
    drawn = exact.drawn_by(graph, log_pf).exp()[graph.last_N]
    assert sorted(drawn.tolist()) == pytest.approx([0.0, 0.5, 0.5])


# Perfect samplers


def test_a_perfect_sampler_of_the_published_small_set_finds_23_of_90_modes():
    table = Set(30, choose=20, energies="small").reward_table()
    assert expected_modes(table, 163_200) == pytest.approx(23.04, abs=5e-3)
    assert math.exp(expected_log_reward(table)) == pytest.approx(0.0205, abs=5e-5)
    assert table.count_K.sum().item() == pytest.approx(math.comb(30, 20), rel=1e-12)


def test_the_expected_modes_are_those_of_a_simulation():
    env = Set(16, choose=8)
    graph = listed(env)
    table, counted = env.reward_table(), reward_table(env, graph)
    assert counted is not None
    for samples in (500, 3200):
        expected = expected_modes(table, samples)
        assert expected == pytest.approx(expected_modes(counted, samples), rel=1e-9)
        generator = torch.Generator().manual_seed(0)
        law = exact.target(graph).exp()
        mode = env.is_mode(graph.state_NC) & graph.last_N
        found = []
        for _ in range(200):
            drawn = torch.multinomial(law, samples, replacement=True, generator=generator).unique()
            found.append(float(mode[drawn].sum()))
        error = torch.tensor(found).std().item() / 200**0.5
        assert abs(sum(found) / 200 - expected) < 4 * error
    assert expected_log_reward(table) == pytest.approx(expected_log_reward(counted), abs=1e-9)
    assert expected_log_reward(counted) == pytest.approx((2 * graph.log_R_N).logsumexp(0).item() - exact.log_z(graph))

"""What every environment promises, on small forms whose states can be listed."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.flow_config import FlowConfig, FlowTrainConfig
from pondera.flows.environments.base import Environment
from pondera.flows.environments.bit import Bit
from pondera.flows.environments.hyper_grid import HyperGrid
from pondera.flows.environments.set import PUBLISHED, Set, _binned, _exact
from pondera.flows.environments.spans import Spans
from pondera.flows.environments.table import Table
from pondera.flows.graph import listed
from pondera.flows.perfect import expected_log_reward
from pondera.flows.train import FlowTrainer

FORMS = [form for method in spec.index(("environment",)).values() for form in method.examples.values()]
FORMS += ["Set(1, choose=1)", "Set(4, choose=4)", "Bit(3, word=3, modes=1)", "Bit(4, word=1, modes=2, within=1)"]
FORMS += [
    "HyperGrid(1, side=2)",
    "HyperGrid(3, side=3)",
    "Spans(('a',), longest=1)",
    "Spans(('a', 'b', 'abab'), longest=3)",
]


def built(form: str) -> Environment:
    return spec.build(form, "environment")


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_actions_are_the_same_edges(form: str):
    env = built(form)
    graph = listed(env)
    states = graph.state_NC
    assert len(states) == env.count_states() == len(env.key(states).unique()) and spec.build(repr(env), "environment")
    forward = {(int(p), int(a), int(c)) for p, a, c in zip(graph.parent_E, graph.action_E, graph.child_E, strict=True)}
    number = {int(key): index for index, key in enumerate(env.key(states))}
    child, action = env.backward_mask(states).nonzero(as_tuple=True)
    parent = [number[int(key)] for key in env.key(env.undo(states[child], action))]
    backward = {(p, int(a), int(c)) for p, a, c in zip(parent, action, child, strict=True)}
    assert forward == backward
    assert len({(p, c) for p, _, c in forward}) == len(forward), "two actions join the same states"
    assert states[0].equal(env.start(1)[0]) and not env.backward_mask(states[:1]).any()
    assert torch.equal(env.finished(states), ~env.forward_mask(states).any(1))


@pytest.mark.parametrize("form", FORMS)
def test_counts_lengths_and_features_are_those_of_the_listed_states(form: str):
    env = built(form)
    graph = listed(env)
    last = graph.state_NC[graph.last_N]
    assert env.count_modes() in (None, int(env.is_mode(last).sum()))
    assert int(graph.level_N.max()) == env.longest
    remaining = torch.zeros(len(graph.state_NC), dtype=torch.long)
    shortest = torch.where(graph.last_N, 0, 10**6)
    for edges in reversed(graph.layers):
        parent, child = graph.parent_E[edges], graph.child_E[edges]
        remaining = remaining.scatter_reduce(0, parent, remaining[child] + 1, "amax")
        shortest = shortest.scatter_reduce(0, parent, shortest[child] + 1, "amin")
    assert torch.equal(env.remaining(graph.state_NC), remaining)
    assert env.graded == bool((shortest[0] == remaining[0]).item()) and type(env.graded) is bool and env.why_graded
    unfinished = graph.state_NC[~graph.last_N]
    features = env.features(unfinished)
    assert features.shape == (len(unfinished), env.width) and len(features.unique(dim=0)) == len(unfinished)
    drawn = env.uniform(50, torch.Generator().manual_seed(0))
    assert env.finished(drawn).all() and torch.isin(env.key(drawn), env.key(last)).all()
    assert env.log_partial(last).dtype == torch.float64


def test_the_reward_of_a_set_is_the_product_over_its_items():
    env = Set(6, choose=3, seed=4)
    graph = listed(env)
    sets = {
        tuple(row.nonzero()[:, 0].tolist()): value for row, value in zip(graph.state_NC, graph.log_R_N, strict=True)
    }
    for items in combinations(range(6), 3):
        assert sets[items].item() == pytest.approx(-sum(float(env.energy_N[item]) for item in items))


def test_the_table_of_rewards_of_sets_is_that_of_the_listed_sets():
    for energies in (None, [0.5, 0.5, -0.25, -0.25, -0.25, 1.0, 0.0]):
        env = Set(7, choose=3, energies=energies, threshold=1.0)
        table, graph = env.reward_table(), listed(env)
        every = torch.repeat_interleave(table.log_R_K, table.count_K.long()).sort().values
        torch.testing.assert_close(every, graph.log_R_N[graph.last_N].sort().values, rtol=0, atol=1e-9)
    assert Set(16, choose=8).count_modes() == math.ceil(0.005 * math.comb(16, 8)) == 65


@pytest.mark.parametrize("name", ["small", "large"])
def test_the_mean_reward_of_published_sets_is_a_ratio_of_symmetric_polynomials(name: str):
    """Σ R is the elementary symmetric polynomial of the rewards of the items, Σ R² that of their squares."""
    items, choose, _, _ = PUBLISHED[name]
    env = Set(items, choose=choose, energies=name)
    sums = [[1.0] + [0.0] * choose for _ in range(2)]
    for energy in env.energy_N.tolist():
        for power, terms in enumerate(sums, start=1):
            for count in range(choose, 0, -1):
                terms[count] += terms[count - 1] * math.exp(-power * energy)
    table = env.reward_table()
    exact = sums[1][choose] / sums[0][choose]
    assert math.exp(expected_log_reward(table)) == pytest.approx(exact, rel=1e-9 if name == "small" else 1e-3)
    assert table.count_K.sum().item() == pytest.approx(math.comb(items, choose), rel=1e-9)


def test_a_large_set_of_different_energies_is_counted_in_bins():
    env = Set(60, choose=30)
    table = env.reward_table()
    share = env.count_modes() / math.comb(60, 30)
    assert table.count_K.sum().item() == pytest.approx(math.comb(60, 30)) and share == pytest.approx(0.005, rel=0.01)
    small = Set(8, choose=4, seed=1)
    groups = [(energy, [1, 1]) for energy in small.energy_N.tolist()]
    (rough, ways), (sharp, _) = _binned(groups, 4), _exact(groups, 4)
    every = torch.from_numpy(rough).repeat_interleave(torch.from_numpy(ways).long()).sort().values
    torch.testing.assert_close(every, torch.from_numpy(sharp).sort().values, rtol=0, atol=8 * 2.5e-4 / 2)


def test_published_sets_have_their_sizes_and_modes():
    for name, (items, choose, _, energies) in PUBLISHED.items():
        assert len(energies) == 10 and items % 10 == 0 and 0 < choose < items, name
    small = Set(30, choose=20, energies="small")
    assert small.count_modes() == 90


def test_the_reward_of_bits_falls_with_the_distance_to_the_nearest_mode():
    env = Bit(6, word=2, modes=3, sharpness=1.5, seed=1)
    graph = listed(env)
    modes = [f"{value:06b}" for value in ((env.mode_MW * torch.tensor([16, 4, 1])).sum(1)).tolist()]
    for state, log_R in zip(graph.state_NC[graph.last_N], graph.log_R_N[graph.last_N], strict=True):
        text = "".join(f"{word - 1:02b}" for word in state.tolist())
        distance = min(sum(a != b for a, b in zip(text, mode, strict=True)) for mode in modes)
        assert log_R.item() == -1.5 * distance and bool(env.is_mode(state[None])) == (distance == 0)


def test_the_hyper_grid_has_the_published_reward():
    env = HyperGrid(2, side=8, base=0.01)
    for place in product(range(8), repeat=2):
        off = [abs(x / 7 - 0.5) for x in place]
        reward = 0.01 + 0.5 * all(x > 0.25 for x in off) + 2 * all(0.3 < x < 0.4 for x in off)
        assert env.log_partial(torch.tensor([[*place, 1]])).exp().item() == pytest.approx(reward)


def test_strings_of_spans_are_all_strings_up_to_a_length():
    env = Spans()
    graph = listed(env)
    texts = env.text(graph.state_NC[graph.last_N])
    assert sorted(texts) == sorted("".join(letters) for n in range(7) for letters in product("ab", repeat=n))
    changes = [sum(a != b for a, b in zip(text, text[1:], strict=False)) for text in texts]
    assert graph.log_R_N[graph.last_N].tolist() == [0.5 * count for count in changes]


def test_a_graph_is_read_from_a_file(tmp_path):
    (tmp_path / "graph.yaml").write_text("edges: [[s, 1], [s, 2], [1, 2]]\nrewards: {2: 3.0}\n")
    env = Table(file=str(tmp_path / "graph.yaml"))
    assert (env.graded, env.longest, env.count_states()) == (False, 2, 3)
    (tmp_path / "graph.yaml").write_text("edges: [[s, 1]]\n")
    with pytest.raises(UserError, match=r"graph.yaml: expected `edges`"):
        Table(file=str(tmp_path / "graph.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        Table(file=str(tmp_path / "none.yaml"))


EDGES = "[('s', 'a'), ('a', 'x')]"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (f"Table({EDGES}, {{}})", "'x' has no children and no reward; give it one, 0 to forbid it"),
        (f"Table({EDGES}, {{'x': 0.0}})", "all are 0, so there is nothing to draw"),
        (f"Table({EDGES}, {{'x': -1.0}})", "'x' has the reward -1.0; give a finite number"),
        (f"Table({EDGES}, {{'x': 1e999}})", "'x' has the reward inf"),
        (f"Table({EDGES}, {{'x': 1.0, 'a': 1.0}})", "'a' has children, so it is no finished object; add an edge"),
        (f"Table({EDGES}, {{'x': 1.0, 'y': 1.0}})", "'y' is in no edge, so it cannot be reached"),
        ("Table([('s', 'a'), ('a', 'b'), ('b', 'a'), ('b', 'x')], {'x': 1.0})", "there is a cycle, a -> b -> a"),
        ("Table([('s', 's')], {'s': 1.0})", "there is a cycle, s -> s"),
        ("Table([('s', 'x'), ('t', 'x')], {'x': 1.0})", "'s', 't' have no parents, so all but one"),
        ("Table([('s', 'x'), ('s', 'x')], {'x': 1.0})", "is given twice"),
        ("Table([('s',)], {'x': 1.0})", "expected pairs of parent and child"),
        ("Table()", "give edges="),
        ("Set(5, choose=6)", "choose=6: give a whole number from 1 to 5"),
        ("Set(5, choose=2, energies=[1.0])", "energies: give 5 finite numbers"),
        ("Set(5, choose=2, energies='small')", "belong to Set(30, choose=20)"),
        ("Set(5, choose=2, threshold=0.0)", "threshold=0.0: give a reward above 0"),
        ("Bit(7, word=2)", "give a multiple of 2 bits"),
        ("Bit(2, word=2, modes=5)", "modes=5: give a whole number from 1 to 4"),
        ("HyperGrid(2, base=0.0)", "base=0.0: give a reward above 0"),
        ("HyperGrid(2, side=1)", "side=1: give a whole number from 2"),
        ("Spans(('ab',))", "every letter must be a span, too; a, b is not"),
        ("Spans(('a', ''))", "give different texts, none of them empty"),
    ],
)
def test_what_cannot_be_is_refused(form: str, message: str):
    with pytest.raises(UserError) as caught:
        built(form)
    assert message in str(caught.value)


def test_a_reward_that_is_not_a_number_is_refused():
    with pytest.raises(UserError, match="'x' has the reward nan"):
        Table([("s", "x")], {"x": math.nan})


def test_too_many_states_are_not_listed():
    with pytest.raises(UserError, match="at most 300,000 can be listed"):
        listed(Set(30, choose=20, energies="small"))
    with pytest.raises(UserError, match="too many states to number them"):
        HyperGrid(100, side=8).key(HyperGrid(100, side=8).start(1))


OWN = '''
"""Coin: one throw."""

import torch

from pondera.flows.environments.base import Environment


class Coin(Environment):
    """Heads or tails."""

    def __init__(self, heads: float = 0.5) -> None:
        self.heads, self.radices, self.actions, self.graded, self.longest = heads, (3,), 2, True, 1

    def forward_mask(self, state_BC):
        return (state_BC == 0).expand(-1, 2)

    def backward_mask(self, state_BC):
        return state_BC == torch.tensor([1, 2])

    def step(self, state_BC, action_B):
        return state_BC + 1 + action_B[:, None]

    def undo(self, state_BC, action_B):
        return torch.zeros_like(state_BC)

    def finished(self, state_BC):
        return state_BC[:, 0] > 0

    def log_partial(self, state_BC):
        return torch.tensor([1.0, self.heads, 1 - self.heads], dtype=torch.float64).log()[state_BC[:, 0]]

    def is_mode(self, state_BC):
        return state_BC[:, 0] == 1

    def remaining(self, state_BC):
        return (state_BC[:, 0] == 0).long()

    def count_states(self):
        return 3

    def count_modes(self):
        return 1

    def uniform(self, count, generator):
        return 1 + torch.randint(2, (count, 1), generator=generator)
'''


def test_an_environment_of_the_user_is_one_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "coin.py").write_text(OWN)
    monkeypatch.setenv("PONDERA_METHODS", str(tmp_path))
    trainer = FlowTrainer(FlowConfig(environment="Coin(0.75)", train=FlowTrainConfig(steps=300, lr=1e-2)))
    while trainer.done < 300:
        trainer.step()
    found = trainer.report()
    assert found.tv is not None and found.tv < 0.02 and found.modes == 1

"""Training of GFlowNets: it reaches the exact law, resumes exactly, and says what α does to the target."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from pondera.core import run_config, spec
from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.flow_config import FlowConfig, FlowTrainConfig, PolicyConfig
from pondera.core.run_folder import Run
from pondera.flows import exact
from pondera.flows.graph import listed
from pondera.flows.report import FlowReport, policy_edges, report, spearman
from pondera.flows.scoring import log_rewards
from pondera.flows.train import FlowTrainer, train_flow

SMALL = "Spans(('a', 'b', 'ab'), longest=3)"
FORBIDDEN = "Table([('s','a'), ('s','b'), ('a','x'), ('a','y'), ('b','z'), ('b','y')], {'x': 0.0, 'y': 0.0, 'z': 1.0})"


def config(
    objective: str = "TB()", environment: str = "Set(6, choose=3)", backward: str = "uniform", **train
) -> FlowConfig:
    settings = {"steps": 20, "batch_size": 8, "save_every": 7, "log_every": 1, "lr": 5e-3} | train
    return FlowConfig(
        environment=environment,
        objective=objective,
        policy=PolicyConfig(width=24, layers=1, backward=backward),
        train=FlowTrainConfig(**settings),
    )


def weights(trainer: FlowTrainer) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in trainer.policy.parameters()])


def trained(settings: FlowConfig) -> FlowTrainer:
    trainer = FlowTrainer(settings)
    while trainer.done < settings.train.steps:
        trainer.step()
    trainer.explore()
    return trainer


@pytest.mark.parametrize("objective", ["TB()", "DB()", "SubTB()", "FLDB()", "FM()"])
@pytest.mark.parametrize("environment", ["Set(6, choose=3)", SMALL])
def test_every_objective_learns_the_target(objective: str, environment: str):
    trainer = trained(config(objective, environment, steps=700, batch_size=16))
    found = trainer.report()
    assert found.tv is not None and found.tv < 0.06 and found.exact
    assert found.mean_reward == pytest.approx(found.target_mean_reward, rel=0.05)
    assert found.slope == pytest.approx(1.0, abs=0.15)
    assert found.samples == 700 * 16 and found.modes_found == found.modes


def test_a_held_alpha_learns_the_tilted_law_where_lengths_vary_and_an_exact_anneal_repairs_it():
    graph = listed(spec.build(SMALL, "environment"))
    _, log_pf = exact.optimum(graph, exact.uniform_backward(graph), 0.8)
    tilted = exact.drawn_by(graph, log_pf)
    assert exact.total_variation(tilted, exact.target(graph)) > 0.4
    held = trained(config("DB(alpha=0.8)", SMALL, steps=700, batch_size=16))
    drawn = exact.drawn_by(graph, policy_edges(graph, held.policy))
    assert exact.total_variation(drawn, tilted) < 0.06
    annealed = trained(config("DB(alpha=0.8, anneal='exact', hold=0.3)", SMALL, steps=1000, batch_size=16))
    assert exact.total_variation(exact.drawn_by(graph, policy_edges(graph, annealed.policy)), exact.target(graph)) < 0.1


@pytest.mark.parametrize("objective", ["TB", "DB", "SubTB", "FLDB"])
def test_with_one_length_alpha_is_an_offset_of_the_flows(objective: str):
    offset = math.log(0.9 / 0.1)
    held = trained(config(f"{objective}(alpha=0.9)", steps=12, seed=3))
    started = trained(config(f"{objective}()", steps=12, seed=3, flow_offset=offset))
    compensated = trained(
        config(f"{objective}(alpha=0.9, anneal='exact', hold=0.2, compensate=True)", steps=12, seed=3)
    )
    torch.testing.assert_close(weights(started), weights(held), rtol=0, atol=2e-5)
    torch.testing.assert_close(weights(compensated), weights(held), rtol=0, atol=2e-5)
    plain = trained(config(f"{objective}()", steps=12, seed=3))
    assert (weights(plain) - weights(held)).abs().max() > 1e-2


def test_a_learned_backward_policy_and_replay_reach_the_target():
    trainer = trained(config("TB()", SMALL, backward="learned", steps=900, batch_size=16, replay=0.25))
    found = trainer.report()
    assert found.tv is not None and found.tv < 0.06 and len(trainer.replay.object_NC) > 10


def test_a_reward_exponent_starts_sharp_and_ends_at_one():
    trainer = FlowTrainer(config(reward_exponent=2.0, steps=100, reward_hold=0.5))
    exponents = []
    for _ in range(100):
        exponents.append(trainer.exponent)
        trainer.step()
    assert exponents[0] == exponents[50] == 2.0 and 1 < exponents[60] < 2 and set(exponents[-10:]) == {1.0}
    env = trainer.env
    last = env.uniform(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_rewards(env, last, 2.0, -30.0), 2 * env.log_partial(last))


@pytest.mark.parametrize("objective", ["TB()", "DB()", "SubTB()", "FLDB()", "FM()"])
def test_a_batch_without_any_reward_leads_to_the_objects_that_have_one(objective: str):
    """Two of three objects are forbidden; a batch of two often has no reward at all."""
    settings = config(objective, FORBIDDEN, steps=600, batch_size=2, min_log_reward=-8.0, lr=1e-2)
    trainer = FlowTrainer(settings)
    first = trainer._batch()
    assert (trainer.env.log_partial(first.last_BC) == -math.inf).any()
    while trainer.done < settings.train.steps:
        trainer.step()
    found = trainer.report()
    assert found.tv is not None and found.tv < 0.15 and found.spearman is None  # one object has a reward


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config("SubTB(alpha=0.7, anneal='exp')", replay=0.5, eval_every=3)
    whole = train_flow(settings, tmp_path / "whole", progress=False)
    step, count = FlowTrainer.step, 0

    def interrupted(self: FlowTrainer) -> float:
        nonlocal count
        count += 1
        if count == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(FlowTrainer, "step", interrupted)
    with pytest.raises(Interrupted, match=r"stopped after step 11; continue with: pondera train .* --resume"):
        train_flow(settings, tmp_path / "part", progress=False)
    monkeypatch.setattr(FlowTrainer, "step", step)
    part = train_flow(settings, tmp_path / "part", resume=True, progress=False)
    assert part.result() == whole.result() and part.metrics() == whole.metrics()
    assert len(part.metrics()) == 20
    one, two = (torch.load(run.model_dir / "policy.pt", weights_only=True) for run in (whole, part))
    assert all(torch.equal(one[name], two[name]) for name in one)
    again = train_flow(settings, tmp_path / "part", resume=True, progress=False)
    assert again.result() == whole.result()
    names = {"config.yaml", "env.json", "metrics.jsonl", "result.json", "model", "checkpoints"}
    assert {path.name for path in part.path.iterdir()} == names


def test_folders_and_settings_are_checked_before_training(tmp_path: Path):
    train_flow(config(steps=2), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="already contains a run; continue it with --resume"):
        train_flow(config(steps=2), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"started with other settings: train.lr \(0.005 before, 0.1 now\)"):
        train_flow(config(steps=2, lr=0.1), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(UserError, match="these are the settings of a GFlowNet"):
        _ = Run.open(tmp_path / "run").config
    assert Run.open(tmp_path / "run").config_of(FlowConfig) == config(steps=2)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    settings = config(steps=20, save_every=5)
    run = Run.create(tmp_path / "run", settings)
    folder = run.checkpoints_dir / "step-000005"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"no")
    with pytest.raises(Failure, match="step-000005 is damaged"):
        train_flow(settings, tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            config("TB(alpha=0.7, anneal='exact', compensate=True)", SMALL),
            "a string can be made of few long or many short",
        ),
        (config("FM()", flow_offset=1.0), "has no log Z to move"),
        (config("TB(alpha=0.0)"), "alpha=0.0: give a number between 0 and 1"),
        (config("TB(alpha=1.0)"), "alpha=1.0: give a number between 0 and 1"),
        (config(epsilon=1.5), "train.epsilon: a share from 0 to 1, got 1.5"),
        (config(steps=0), "train.steps: at least 1, got 0"),
        (config(temperature=0.0), "train.temperature: a number above 0"),
        (config(min_log_reward=-math.inf), "train.min_log_reward: a finite number"),
        (config(reward_hold=1.0), "train.reward_hold: a share from 0 to below 1"),
        (config(backward="uniforn"), "unknown policy.backward 'uniforn'"),
        (config(environment="Sett(5)"), "unknown environment method 'Sett'"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings: FlowConfig, message: str):
    with pytest.raises(UserError) as caught:
        FlowTrainer(settings)
    assert message in str(caught.value)


def test_it_is_said_what_an_anneal_or_a_held_alpha_does(caplog: pytest.LogCaptureFixture):
    def said(objective: str, environment: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            FlowTrainer(config(objective, environment))
        return caplog.text

    graded = said("TB(alpha=0.9, anneal='exact')", "Set(6, choose=3)")
    assert "every alpha has the same target" in graded and "up to 6.6 nats" in graded and "Hold alpha" in graded
    assert "not to R. Add anneal='exact'" in said("DB(alpha=0.7)", SMALL)
    for objective, environment in (
        ("TB(alpha=0.9)", "Set(6, choose=3)"),
        ("TB(alpha=0.9, anneal='exact', compensate=True)", "Set(6, choose=3)"),
        ("TB(alpha=0.9, anneal='exact')", SMALL),
        ("TB()", SMALL),
    ):
        assert said(objective, environment) == ""


# The report


def test_a_policy_at_the_optimum_has_a_perfect_report_and_a_sharper_one_does_not():
    trainer = FlowTrainer(config(environment=SMALL))
    graph = listed(trainer.env)

    class Exact(torch.nn.Module):
        def __init__(self, exponent: float) -> None:
            super().__init__()
            flow = exact.optimum(graph, exact.uniform_backward(graph))[1] if exponent == 1 else None
            log_R = exponent * graph.log_R_N
            changed = dataclasses.replace(graph, log_R_N=log_R)
            self.log_pf = exact.optimum(changed, exact.uniform_backward(graph))[1] if flow is None else flow

        def outputs(self, env, state_NC):
            table = torch.full((len(graph.state_NC), env.actions), -math.inf, dtype=torch.float64)
            table[graph.parent_E, graph.action_E] = self.log_pf
            keys = env.key(graph.state_NC)
            rows = [int((keys == key).nonzero()[0]) for key in env.key(state_NC)]
            return type("Found", (), {"log_pf_NA": table[rows]})

    right = report(trainer.env, Exact(1.0), 100, 3, torch.Generator(), graph)  # type: ignore[arg-type]
    assert right.tv == pytest.approx(0.0, abs=1e-12) and right.slope == pytest.approx(1.0)
    assert right.mean_reward == pytest.approx(right.target_mean_reward)
    sharp = report(trainer.env, Exact(2.0), 100, 3, torch.Generator(), graph)  # type: ignore[arg-type]
    assert sharp.slope == pytest.approx(2.0) and sharp.tv is not None and sharp.tv > 0.1
    assert right.target_mean_reward is not None and sharp.mean_reward > right.target_mean_reward


def test_an_environment_that_is_too_large_to_list_is_measured_on_samples():
    settings = config("TB()", "Set(30, choose=20, energies='small')", steps=3)
    found = trained(settings).report()
    assert not found.exact and found.tv is None and found.modes == 90 and found.perfect_modes is not None
    assert found.spearman is not None and found.slope is not None
    names = [name for name, _ in found.lines()]
    assert names == ["modes found", "a perfect sampler", "mean reward", "distance to R/Z"]


def test_ranks_of_equal_values_are_shared():
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0]).double(), torch.tensor([0.0, 1.0, 3.0, 2.0]).double()
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: the products of deviations sum to 3, the squares to 4.5 and 5.
    assert spearman(a, b) == pytest.approx(3.0 / (4.5 * 5.0) ** 0.5)
    assert spearman(a, torch.ones(4).double()) is None


def test_what_is_unknown_is_said():
    lines = dict(FlowReport(10, 1, None, None, 0.5, None, None, None, None, False).lines())
    assert lines["a perfect sampler"].startswith("cannot be counted") and "target unknown" in lines["mean reward"]
    assert lines["distance to R/Z"] == "unknown"


# Recipes


def test_recipes_load_and_build():
    assert "flow-set" in run_config.flow_recipe_names() and not set(run_config.flow_recipe_names()) & set(
        run_config.recipe_names()
    )
    for name in run_config.flow_recipe_names():
        settings = run_config.load(name, kind=FlowConfig)
        assert settings.name == name and settings.about.endswith(".")
        FlowTrainer(settings)
        assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()

"""`train_flow`: trains a GFlowNet into a run folder with settings, metrics, checkpoints and its report."""

from __future__ import annotations

import logging
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pondera.core import spec
from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.flow_config import FlowConfig, check
from pondera.core.resume import again, check_free, reopened
from pondera.core.run_folder import Run
from pondera.core.stop_signals import stop_signals
from pondera.flows.environments.base import Environment
from pondera.flows.graph import Graph, countable, listed
from pondera.flows.policy import FlowPolicy
from pondera.flows.report import FlowReport, report
from pondera.flows.sampling import Replay, Trajectories, joined, sample, walk_back
from pondera.flows.scoring import log_rewards, score
from pondera.methods.objective.base import Objective
from pondera.methods.objective.common.offset import log_odds
from pondera.methods.objective.common.schedule import remaining_share

FREE = {"train.log_every", "train.save_every", "train.keep", "about", "name"}
"""Settings that may change when a run is resumed: they affect neither the weights nor the samples."""
STATE = "state.pt"

log = logging.getLogger(__name__)


class FlowTrainer:
    """Trains the policy of one config step by step; its state can be saved and restored exactly.

    Args:
        config: the settings.

    Raises:
        UserError: the settings cannot be used.

    Example:
        >>> trainer = FlowTrainer(FlowConfig(environment="Set(5, choose=3)", objective="DB()"))
        >>> trainer.step() > 0
        True
    """

    def __init__(self, config: FlowConfig) -> None:
        check(config)
        self.config, settings = config, config.train
        self.env: Environment = spec.build(config.environment, "environment")
        self.objective: Objective = spec.build(config.objective, "objective")
        check_pair(self.objective, self.env, config)
        self.generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            policy = config.policy
            self.policy = FlowPolicy(self.env, policy.width, policy.layers, policy.backward == "learned")
        network = [one for name, one in self.policy.named_parameters() if name != "log_z"]
        groups = [{"params": network, "lr": settings.lr}, {"params": [self.policy.log_z], "lr": settings.lr_log_z}]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.replay = Replay(settings.replay_size)
        self.done, self.samples = 0, 0
        self.modes: set[bytes] = set()

    @property
    def alpha(self) -> float:
        """α of the next step."""
        return self.objective.alpha_at(self.done, self.config.train.steps)

    @property
    def exponent(self) -> float:
        """The exponent of the reward of the next step."""
        settings = self.config.train
        if settings.reward_exponent == 1:
            return 1.0
        share = remaining_share(self.done, settings.steps, "exact", settings.reward_hold)
        return 1 + (settings.reward_exponent - 1) * share

    @property
    def per_step(self) -> float:
        """Nats per remaining step that are added to log Z and log flows: the offset, and the compensation of a moving α."""
        moved = log_odds(self.objective.alpha) - log_odds(self.alpha) if self.objective.compensate else 0.0
        return self.config.train.flow_offset + moved

    def step(self) -> float:
        """Draws a batch and takes one step of the optimizer; returns the loss.

        Raises:
            Failure: the loss is not finite.
        """
        settings = self.config.train
        batch = self._batch()
        numbers = score(
            self.env, self.policy, batch, self.objective.needs, self.exponent, settings.min_log_reward, self.per_step
        )
        loss = self.objective.loss(numbers, self.alpha)
        value = loss.item()
        if value - value != 0:  # NaN or infinite
            raise Failure(
                f"step {self.done + 1}: the loss is {value}; try a lower learning rate (--train.lr {settings.lr / 3:.1g}) or a "
                f"higher --train.min_log_reward than {settings.min_log_reward}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return value

    def explore(self) -> None:
        """Draws as many fresh samples as were trained on since the last call, and notes the modes among them."""
        count = self.done * self.config.train.batch_size - self.samples
        if count > 0:
            last_BC = sample(self.env, self.logits, count, self.generator).last_BC
            self.modes |= {row.tobytes() for row in last_BC[self.env.is_mode(last_BC)].numpy()}
            self.samples += count

    def logits(self, state_NC: Tensor) -> Tensor:
        """The policy, for samplers."""
        return self.policy.logits(self.env, state_NC)

    def report(self, graph: Graph | None = None) -> FlowReport:
        """The four numbers of the policy now."""
        generator = torch.Generator().manual_seed(self.config.train.seed + 1)
        return report(self.env, self.policy, self.samples, len(self.modes), generator, graph)

    def _batch(self) -> Trajectories:
        settings = self.config.train
        again = round(settings.replay * settings.batch_size) if len(self.replay.object_NC) else 0
        args = (self.generator, settings.epsilon, settings.temperature)
        parts = []
        if settings.batch_size > again:
            parts.append(sample(self.env, self.logits, settings.batch_size - again, *args))
        if again:
            back = self._backward if self.policy.learned_backward else None
            parts.append(walk_back(self.env, self.replay.draw(again, self.generator), self.generator, back))
        if settings.replay and settings.batch_size > again:
            last_BC = parts[0].last_BC
            self.replay.add(last_BC, log_rewards(self.env, last_BC, 1.0, settings.min_log_reward))
        return parts[0] if len(parts) == 1 else joined(*parts)

    def _backward(self, state_NC: Tensor) -> Tensor:
        return self.policy.outputs(self.env, state_NC).log_pb_NA

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        columns = len(self.env.radices)
        modes = (
            torch.frombuffer(bytearray(b"".join(sorted(self.modes))), dtype=torch.long)
            if self.modes
            else torch.zeros(0)
        )
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "replay": {"object": self.replay.object_NC, "log_R": self.replay.log_R_N},
            "modes": modes.view(-1, columns).long(),
            "done": self.done,
            "samples": self.samples,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.replay.object_NC, self.replay.log_R_N = state["replay"]["object"], state["replay"]["log_R"]
        self.modes = {row.tobytes() for row in state["modes"].numpy()}
        self.done, self.samples = state["done"], state["samples"]


def check_pair(objective: Objective, env: Environment, config: FlowConfig) -> None:
    """Refuses an objective that cannot be right on an environment, and logs what an anneal does on a graded one.

    Raises:
        UserError: with what to type instead.
    """
    if objective.compensate and not env.graded:
        raise UserError(
            f"{objective!r}: the amount by which log Z moves with alpha is known if all trajectories have one length, but in "
            f"{env!r} {env.why_graded}; leave compensate out"
        )
    if objective.needs == "edges" and (objective.compensate or config.train.flow_offset):
        raise UserError(
            f"{objective!r} learns flows of edges and has no log Z to move; leave compensate and flow_offset out"
        )
    if env.graded and objective.anneal != "constant" and objective.alpha != 0.5 and not objective.compensate:
        log.warning(
            "note: in %r all trajectories have %d steps, so every alpha has the same target. Moving alpha only puts "
            "log Z wrong, by up to %.1f nats, late in the run. Hold alpha (leave anneal out), or add compensate=True.",
            env,
            env.longest,
            abs(env.longest * log_odds(objective.alpha)),
        )
    if not env.graded and objective.anneal == "constant" and objective.alpha != 0.5:
        log.warning(
            "note: in %r trajectories have different lengths, so alpha=%g draws in proportion to R · E[c^(-steps)] with "
            "c = %.3g, not to R. Add anneal='exact' to end at the reward itself.",
            env,
            objective.alpha,
            objective.alpha / (1 - objective.alpha),
        )


def train_flow(config: FlowConfig, out: Path, resume: bool = False, progress: bool = True) -> Run:
    """Trains one GFlowNet into a run folder.

    With ``resume=True`` an interrupted run continues from its newest checkpoint and ends with the same weights and samples as
    an uninterrupted run. A finished run is returned unchanged.

    Args:
        config: the settings.
        out: the run folder; it must be new or empty, unless `resume`.
        resume: continue the run in `out`.
        progress: print the progress on stderr.

    Raises:
        UserError: settings or folder cannot be used.
        Failure: the loss is not finite, or a checkpoint is damaged.
        Interrupted: the process received SIGINT or SIGTERM; it finished and saved the current step.

    Example::

        run = train_flow(FlowConfig(environment="HyperGrid(2)", objective="DB()"), Path("runs/grid"))
        run.result()["tv"]
    """
    trainer = FlowTrainer(config)
    run = reopened(out, config, FREE) if resume else Run(out)
    if resume and run.result() is not None:
        return run
    if not resume:
        check_free(out)
        Run.create(out, config)
    else:
        _restore(run, trainer)
    stopped: list[bool] = []
    started, first = time.monotonic(), trainer.done
    settings = config.train
    with stop_signals(lambda: stopped.append(True)):
        while trainer.done < settings.steps:
            alpha, exponent = trainer.alpha, trainer.exponent
            loss = trainer.step()
            done = trainer.done
            last = done == settings.steps
            if done % settings.eval_every == 0 or last:
                trainer.explore()
            if done % settings.log_every == 0 or last:
                logged = {"alpha": alpha, "exponent": exponent, "log_z": trainer.policy.log_z.item()}
                run.log(step=done, loss=loss, samples=trainer.samples, modes_found=len(trainer.modes), **logged)
            if progress and (done % max(1, settings.steps // 10) == 0 or last):
                pace = (time.monotonic() - started) / (done - first)
                text = f"step {done}/{settings.steps}  loss {loss:.4f}  {int(pace * (settings.steps - done))} s left"
                print(text, file=sys.stderr, flush=True)
            if (done % settings.save_every == 0 or stopped) and not last:
                _save(run, trainer)
            if stopped and not last:
                raise Interrupted(f"stopped after step {done}; continue with: {again(run.path)}")
    _finish(run, trainer)
    return run


def _finish(run: Run, trainer: FlowTrainer) -> None:
    """Writes the weights and the report."""
    run.model_dir.mkdir(exist_ok=True)
    torch.save(trainer.policy.state_dict(), run.model_dir / "policy.pt")
    graph = listed(trainer.env) if countable(trainer.env) else None
    found = trainer.report(graph).to_dict()
    quarter = next((row for row in run.metrics() if 4 * row["step"] >= trainer.done), None)
    run.write_result(
        {
            **found,
            "modes_at_quarter": quarter["modes_found"] if quarter else None,
            "graded": trainer.env.graded,
            "log_z": trainer.policy.log_z.item() + trainer.per_step * trainer.env.longest,
            "target_log_z": None if graph is None else float(graph.log_R_N.logsumexp(0)),
            "steps": trainer.done,
        }
    )


def _save(run: Run, trainer: FlowTrainer) -> None:
    with run.saving(trainer.done) as folder:
        torch.save(trainer.state(), folder / STATE)
    for old in run.checkpoints()[: -trainer.config.train.keep]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def _restore(run: Run, trainer: FlowTrainer) -> None:
    folders = run.checkpoints()
    if folders:
        try:
            trainer.restore(torch.load(folders[-1] / STATE, weights_only=True))
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise Failure(
                f"{folders[-1]} is damaged ({type(error).__name__}); delete it to continue from the one before"
            ) from None
    log.info("resuming from %s", folders[-1].name if folders else "the start: there is no checkpoint yet")
    run.truncate_after(trainer.done)

"""FlowConfig: all settings of the training of a GFlowNet, written and read like those of a language model (`RunConfig`)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from pondera.core.errors import UserError, unknown
from pondera.core.seams import option


@dataclass
class PolicyConfig:
    """The network: the ``policy`` part of a run."""

    width: int = option(128, "width of the hidden layers")
    layers: int = option(2, "hidden layers")
    backward: str = option("uniform", "the backward policy: uniform over the parents of a state, or learned")


@dataclass
class FlowTrainConfig:
    """Optimization and sampling: the ``train`` part of a run."""

    steps: int = option(800, "optimizer steps")
    batch_size: int = option(16, "trajectories per step")
    lr: float = option(1e-3, "learning rate of the network (Adam)")
    lr_log_z: float = option(0.1, "learning rate of log Z (Adam)")
    epsilon: float = option(0.05, "share of uniformly random actions while sampling for training")
    temperature: float = option(1.0, "temperature of the policy while sampling for training")
    replay: float = option(0.0, "share of each batch that goes back from earlier objects of high reward")
    replay_size: int = option(1000, "different objects kept for replay")
    reward_exponent: float = option(
        1.0, "exponent of the reward at the start, annealed to 1 (a rival of alpha: sharper first)"
    )
    reward_hold: float = option(0.9, "share of the steps before the reward exponent moves")
    flow_offset: float = option(
        0.0,
        "nats per remaining step by which log Z and log flows start too high (a rival of alpha that keeps the target)",
    )
    min_log_reward: float = option(-30.0, "lowest log reward in the loss; objects without reward have it")
    seed: int = option(0, "random seed of weights and samples")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    eval_every: int = option(
        10, "steps between two draws of fresh samples, as many as were trained on, which count modes"
    )
    save_every: int = option(200, "steps between two checkpoints")
    keep: int = option(2, "checkpoints kept")


@dataclass
class FlowConfig:
    """All settings of the training of a GFlowNet."""

    name: str = option("flow", "name of the run in tables")
    about: str = option("", "one sentence that describes the recipe")
    environment: str = option("Set(16, choose=8)", "what is built, e.g. HyperGrid(4, side=8)")
    objective: str = option("TB()", "the loss, e.g. SubTB(alpha=0.7)")
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train: FlowTrainConfig = field(default_factory=FlowTrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain mappings, ready for YAML or JSON."""
        return dataclasses.asdict(self)


def check(config: FlowConfig) -> None:
    """Refuses settings that are out of range.

    Raises:
        UserError: with the setting, its value and what is allowed.
    """
    train, policy = config.train, config.policy
    for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "keep", "replay_size"):
        if getattr(train, name) < 1:
            raise UserError(f"train.{name}: at least 1, got {getattr(train, name)}")
    for name in ("width", "layers"):
        if not 1 <= getattr(policy, name) <= 10_000:
            raise UserError(f"policy.{name}: from 1 to 10000, got {getattr(policy, name)}")
    for name in ("lr", "lr_log_z", "temperature", "reward_exponent"):
        if not 0 < getattr(train, name) < math.inf:
            raise UserError(f"train.{name}: a number above 0, got {getattr(train, name)}")
    for name in ("epsilon", "replay"):
        if not 0 <= getattr(train, name) <= 1:
            raise UserError(f"train.{name}: a share from 0 to 1, got {getattr(train, name)}")
    for name in ("flow_offset", "min_log_reward"):
        if not math.isfinite(getattr(train, name)):
            raise UserError(f"train.{name}: a finite number, got {getattr(train, name)}")
    if not 0 <= train.reward_hold < 1:
        raise UserError(f"train.reward_hold: a share from 0 to below 1, got {train.reward_hold}")
    if not 0 <= train.seed < 2**32:
        raise UserError(f"train.seed: an integer from 0 to 2**32 - 1, got {train.seed}")
    if policy.backward not in ("uniform", "learned"):
        raise unknown("policy.backward", policy.backward, ("uniform", "learned"))

"""The runs of a comparison: their configs and their folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pondera.core.run_config import RunConfig


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same config with another seed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def folder_of(config: RunConfig, out: Path) -> Path:
    """The folder of a run in a comparison: named by variant, steps and seed."""
    return out / "runs" / f"{config.name}-{config.train.steps}steps-seed{config.train.seed}"

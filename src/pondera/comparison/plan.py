"""The runs of a comparison: their configs and their folders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from pondera.core.run_config import RunConfig


@dataclass(frozen=True)
class PlannedVariant:
    """A variant of a comparison before its runs are trained.

    Args:
        config: its config, with the first seed.
        tag: what the names of its folders say in addition, e.g. ``"-lr0.004"``.
        control_of: the name of the variant whose random control it is; default: `None`, it is not a control.
    """

    config: RunConfig
    tag: str = ""
    control_of: str | None = None

    def runs(self, seeds: int, out: Path) -> dict[Path, RunConfig]:
        """The folder and the config of each run.

        Args:
            seeds: the number of seeds.
            out: the folder of the comparison.
        """
        first = self.config.train.seed
        configs = [with_seed(self.config, first + number) for number in range(seeds)]
        return {folder_of(config, out, self.tag): config for config in configs}


def in_order(variants: list[PlannedVariant], seeds: int, out: Path) -> dict[Path, RunConfig]:
    """The runs of several variants in the order of training: all variants with the first seed, then the next seed."""
    each = [list(variant.runs(seeds, out).items()) for variant in variants]
    return dict(run for of_one_seed in zip(*each, strict=True) for run in of_one_seed)


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same config with another seed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def folder_of(config: RunConfig, out: Path, tag: str = "", kind: str = "runs") -> Path:
    """The folder of a run in a comparison: named by variant, steps and seed.

    Args:
        config: the config of the run.
        out: the folder of the comparison.
        tag: what the name says in addition.
        kind: the folder in `out` for runs of this kind.
    """
    return out / kind / f"{config.name}{tag}-{config.train.steps}steps-seed{config.train.seed}"

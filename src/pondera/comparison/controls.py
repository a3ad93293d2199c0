"""Random controls: for each model that learns which tokens take its passes, one whose passes go to random tokens.

Their mean passes per token are those that the learned runs measured, so a control is trained after them. If the rule of a
model is worth its name, the model is better than its control. Which tokens these are follows from the seed of each run and from
the tokens before, so it differs between seeds and has nothing to do with what a token means.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

from pondera.comparison.plan import PlannedVariant
from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run

SUFFIX = "-random"


def control_of(config: RunConfig, passes: float) -> RunConfig | None:
    """The config of the control: the same settings with another think method.

    Args:
        config: the config of the learned model.
        passes: the mean passes per token of the control.

    Returns:
        The config; `None` if the model does not learn which tokens take its passes.

    Example:
        >>> learned = RunConfig(name="cot", think="AdaptiveLatentCoT(steps=2, halting='router')")
        >>> control = control_of(learned, 1.75)
        >>> control.name, control.think
        ('cot-random', "AdaptiveLatentCoT(2, halting='random')")
    """
    if config.think is None or config.data.known_difficulty:  # the difficulty then replaces the learned rule
        return None
    method = spec.build(config.think, "think").random_control(passes)
    if method is None:
        return None
    about = f"{config.name} with random halting at the same mean passes per token."
    return dataclasses.replace(config, name=config.name + SUFFIX, about=about, think=repr(method))


def check_names(configs: list[RunConfig]) -> None:
    """Refuses a recipe with the name of a control.

    Raises:
        UserError: two variants of the comparison would have the same name.
    """
    names = {config.name for config in configs}
    for config in configs:
        if config.name + SUFFIX in names and control_of(config, 1.0) is not None:
            raise UserError(
                f"compare: {config.name + SUFFIX} is the name of the random control of {config.name}, which is trained "
                "in addition; give the recipe another name, or leave controls out with --no-controls"
            )


def random_controls(variants: list[PlannedVariant], seeds: int, out: Path) -> list[PlannedVariant]:
    """The controls of some variants whose runs are finished.

    Args:
        variants: the variants.
        seeds: the number of seeds.
        out: the folder of the comparison.

    Returns:
        One control for each variant that has one and whose passes differ between tokens. The names of its folders say its
        passes, because they depend on the seeds that have been trained: with more seeds, other controls are needed.
    """
    controls = []
    for variant in variants:
        if control_of(variant.config, 1.0) is None:
            continue
        measured = [(Run.open(folder).result() or {})["passes_per_token"] for folder in variant.runs(seeds, out)]
        passes = round(statistics.fmean(measured), 4)
        most = spec.build(str(variant.config.think), "think").passes()
        # If every token takes one pass, or all of them, random tokens would take the same.
        config = control_of(variant.config, passes) if 1.005 < passes < most - 0.005 else None
        if config is not None:
            controls.append(PlannedVariant(config, f"{variant.tag}-{passes}passes", variant.config.name))
    return controls


def with_controls(variants: list[PlannedVariant], controls: list[PlannedVariant]) -> list[PlannedVariant]:
    """The variants in the order of the table: each control follows its variant."""
    by_name = {control.control_of: [control] for control in controls}
    return [one for variant in variants for one in (variant, *by_name.get(variant.config.name, []))]

"""A sweep tunes one setting for each recipe before the recipes are compared.

Every recipe is trained with every value for its full number of steps, and the value with the best final score is chosen for
each recipe. These runs have a seed that is not among the compared ones: otherwise the run that looked best by chance would
be compared again, and the intervals would be too narrow. They are ordinary run folders under ``OUT/tuning``.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera.comparison.plan import folder_of, with_seed
from pondera.comparison.training import train_all
from pondera.core import run_config
from pondera.core.errors import Failure, UserError, unknown
from pondera.core.metric import score_name
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run

TUNABLE = tuple(f"train.{name}" for name, hint in typing.get_type_hints(TrainConfig).items() if hint is float)
"""The settings that a sweep can tune: numbers of the optimizer, which do not change what a step costs."""

TUNING_SEED = 1000
"""Added to the first seed. It does not depend on the number of seeds, so that more seeds need no new tuning."""


@dataclass(frozen=True)
class Sweep:
    """One setting and the values to try.

    Args:
        setting: its dotted name, one of `TUNABLE`.
        values: two or more different values; they are sorted.

    Raises:
        UserError: the setting cannot be tuned, or the values cannot be used.

    Example:
        >>> Sweep.parse("train.lr=4e-3,2e-3,8e-3")
        Sweep(setting='train.lr', values=(0.002, 0.004, 0.008))
    """

    setting: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_setting(self.setting)
        if len(set(self.values)) < len(self.values):
            raise UserError(f"{self}: a value occurs twice; give each value once")
        if len(self.values) < 2:
            raise UserError(
                f"{self}: one value leaves nothing to choose; give several, separated by commas, "
                f"or set it for all recipes with --{self.setting} {self.values[0] if self.values else 'VALUE'}"
            )
        object.__setattr__(self, "values", tuple(sorted(self.values)))

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Reads ``SETTING=VALUE,VALUE,...``.

        Raises:
            UserError: the text has another form, or a value is not a number.
        """
        setting, equals, listed = text.partition("=")
        if not equals:
            raise UserError(f"--sweep {text}: give a setting and its values, e.g. --sweep train.lr=2e-3,4e-3,8e-3")
        setting, values = setting.removeprefix("--"), []
        _check_setting(setting)
        for part in listed.split(","):
            value = run_config.scalar(part.strip())
            if type(value) not in (int, float):
                raise UserError(
                    f"--sweep {text}: {part!r} is not a number; give numbers separated by commas, "
                    "e.g. --sweep train.lr=2e-3,4e-3,8e-3"
                )
            values.append(float(value))
        return cls(setting, tuple(values))

    def __str__(self) -> str:
        """The option on the command line."""
        return f"--sweep {self.setting}={','.join(map(str, self.values))}"

    def applied(self, config: RunConfig, value: float) -> RunConfig:
        """The config with this value."""
        name = self.setting.removeprefix("train.")
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **{name: value}))

    def tag(self, value: float) -> str:
        """What the name of a run folder says about this value.

        Example:
            >>> Sweep("train.lr", (0.002, 0.004)).tag(0.004)
            '-lr0.004'
        """
        return f"-{self.setting.removeprefix('train.')}{value}"


def _check_setting(setting: str) -> None:
    if setting in TUNABLE:
        return
    if setting in run_config.fields():
        raise UserError(
            f"--sweep {setting}: only settings that leave cost and data equal can be tuned: {', '.join(TUNABLE)}"
        )
    raise unknown("setting to sweep", setting, TUNABLE)


def tune(
    configs: list[RunConfig], sweep: Sweep, seeds: int, out: Path, progress: bool, jobs: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains every config with every value and chooses the value with the best score for each.

    Args:
        configs: the recipes, with the first of the compared seeds.
        sweep: the setting and its values.
        seeds: the number of compared seeds.
        out: the folder of the comparison.
        progress: show progress.
        jobs: the number of runs that train at the same time.

    Returns:
        The chosen value by name, and the ``sweep`` entry of ``results.json``: the setting, its values, the seeds, and for
        each recipe its scores, the chosen value and a note if it is the smallest or the largest one.

    Raises:
        Failure: a run failed, e.g. because the loss became infinite with one of the values.
    """
    more = max(TUNING_SEED, seeds)
    tuned = [with_seed(config, config.train.seed + more) for config in configs]
    folders = {
        (config.name, value): folder_of(sweep.applied(config, value), out, sweep.tag(value), "tuning")
        for value in sweep.values
        for config in tuned
    }
    runs = [sweep.applied(config, value) for value in sweep.values for config in tuned]
    try:
        train_all(dict(zip(folders.values(), runs, strict=True)), progress, jobs)
    except Failure as error:
        raise Failure(f"{error}\nIf the model cannot be trained with this value, leave it out of {sweep}") from None
    results = {key: Run.open(folder).result() or {} for key, folder in folders.items()}
    score = score_name(list(results.values()))
    scores = {config.name: [results[config.name, value][score] for value in sweep.values] for config in configs}
    chosen = {name: sweep.values[values.index(min(values))] for name, values in scores.items()}
    entry = {
        "setting": sweep.setting,
        "values": list(sweep.values),
        "seeds": sorted({config.train.seed for config in tuned}),
        "score": score,
        "scores": scores,
        "chosen": chosen,
        "notes": [note for name, value in chosen.items() if (note := _at_an_end(name, value, sweep))],
    }
    return chosen, entry


def _at_an_end(name: str, value: float, sweep: Sweep) -> str:
    """A warning if a better value may lie outside of the list; nothing is smaller than 0."""
    if value == sweep.values[0] != 0:
        return f"The best {sweep.setting} of {name} is the smallest, {value}; add smaller ones."
    if value == sweep.values[-1]:
        return f"The best {sweep.setting} of {name} is the largest, {value}; add larger ones."
    return ""

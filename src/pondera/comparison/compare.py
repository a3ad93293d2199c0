"""`compare`: trains several variants on the same text at equal cost, with the same seeds, and reports the differences.

Runs are ordinary run folders under ``OUT/runs``. Finished runs with the same config are reused and interrupted runs are
resumed, so a comparison can be stopped, started again and extended by variants or seeds.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from pondera.comparison.controls import check_names, random_controls, with_controls
from pondera.comparison.equal_cost import at_equal_flops
from pondera.comparison.plan import PlannedVariant, in_order
from pondera.comparison.rows import summarise
from pondera.comparison.sweep import Sweep, tune
from pondera.comparison.training import train_all
from pondera.core.errors import Interrupted, UserError, unknown
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import write_atomic
from pondera.training.build import resolve
from pondera.training.train import check_settings

EQUAL = ("tokens", "flops")


def compare(
    recipes: list[str],
    seeds: int = 3,
    equal: str = "tokens",
    flops: float | None = None,
    out: Path = Path("runs/compare"),
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
    jobs: int = 1,
    sweep: Sweep | None = None,
    controls: bool = True,
) -> dict[str, Any]:
    """Trains every recipe with every seed, then writes ``results.json`` and ``report.html`` to `out`.

    Args:
        recipes: names or YAML files; the first is the baseline.
        seeds: the number of seeds, starting at ``train.seed``.
        equal: ``"tokens"`` trains each recipe for its own number of steps; ``"flops"`` sets the steps so that all spend
            the same training FLOPs.
        flops: the budget of ``"flops"`` (default: `None`, the training FLOPs of the first recipe).
        out: the folder for runs and results.
        overrides: dotted settings for every recipe.
        progress: show progress.
        jobs: the number of runs that train at the same time, each in a process with an equal part of the cores.
        sweep: a setting to tune for each recipe first, with a seed that is not compared (default: `None`, nothing).
        controls: for each recipe that learns which tokens take its passes, also train its random control.

    Returns:
        ``{"equal", "seeds", "command", "baseline", "rows": [...], "verdict": [...]}``; a row has the `name` of the
        variant, its `runs` (folders below `out`), and for each measure the mean, the spread (sample standard deviation)
        and the value of each seed. ``"comparisons"`` is the number of differences that the verdict looks at, for which
        its significance is corrected. With a sweep also ``"sweep"``: the setting, its values, the seeds of its runs, and
        the scores and the chosen value of each recipe. The row of a random control has the name of its variant in
        ``control_of``.

    Raises:
        UserError: a recipe does not exist, two recipes have the same name, a number is out of range, or `out` contains a
            different run under the same name.
        Failure: a run failed; the other runs were stopped and saved.
        Interrupted: the process received SIGINT or SIGTERM; finished and saved work is kept.
    """
    if equal not in EQUAL:
        raise unknown("--equal", equal, EQUAL)
    if seeds < 1 or jobs < 1:
        raise UserError(f"--seeds {seeds}, --jobs {jobs}: give 1 or more")
    configs = _configs(recipes, equal, flops, overrides, sweep)
    if controls:
        check_names(configs)
    typed = command(recipes, seeds, equal, flops, overrides, jobs, sweep, controls)
    try:
        variants, tuned = _train(configs, seeds, out, progress, jobs, sweep, controls)
    except (Interrupted, KeyboardInterrupt):
        again = f"{typed} --out {shlex.quote(str(out))}"
        raise Interrupted(f"stopped; the runs so far are kept; continue with:\n{again}") from None
    folders = list(in_order(variants, seeds, out))
    controlled = {one.config.name: one.control_of for one in variants if one.control_of is not None}
    result = summarise([one.config.name for one in variants], folders, controlled)
    result |= {"equal": equal, "seeds": seeds, "command": typed} | ({"sweep": tuned} if tuned else {})
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    from pondera.report.page import write_report

    title = f"{', '.join(config.name for config in configs)} at equal {equal}"
    title += f", {sweep.setting} tuned" if sweep else ""
    write_report(folders, out / "report.html", title, comparisons=result["comparisons"])
    return result


def _train(
    configs: list[RunConfig], seeds: int, out: Path, progress: bool, jobs: int, sweep: Sweep | None, controls: bool
) -> tuple[list[PlannedVariant], dict[str, Any] | None]:
    """Tunes the recipes, trains them and then their controls; returns all variants and the record of the sweep."""
    variants, tuned = [PlannedVariant(config) for config in configs], None
    if sweep is not None:
        chosen, tuned = tune(configs, sweep, seeds, out, progress, jobs)
        values = [chosen[config.name] for config in configs]
        variants = [
            PlannedVariant(sweep.applied(config, value), sweep.tag(value))
            for config, value in zip(configs, values, strict=True)
        ]
    train_all(in_order(variants, seeds, out), progress, jobs)
    if controls:
        random = random_controls(variants, seeds, out)
        train_all(in_order(random, seeds, out), progress, jobs)
        variants = with_controls(variants, random)
    return variants, tuned


def _configs(
    recipes: list[str], equal: str, flops: float | None, overrides: dict[str, Any] | None, sweep: Sweep | None
) -> list[RunConfig]:
    """The checked configs of the recipes, at equal cost."""
    if sweep is not None and sweep.setting in (overrides or {}):
        raise UserError(f"{sweep} and --{sweep.setting}: leave one of them out")
    configs = [resolve(load(recipe, overrides)) for recipe in recipes]
    if len({config.name for config in configs}) < len(configs):
        raise UserError(
            f"compare: two recipes have the same name ({', '.join(config.name for config in configs)}); give each its own"
        )
    for config in configs:
        for tried in [sweep.applied(config, value) for value in sweep.values] if sweep else [config]:
            check_settings(tried.train)
    if equal == "flops":
        return at_equal_flops(configs, flops)
    if flops is not None:
        raise UserError("--flops sets the budget of --equal flops; add --equal flops, or leave --flops out")
    return configs


def command(
    recipes: list[str],
    seeds: int,
    equal: str,
    flops: float | None,
    overrides: dict[str, Any] | None,
    jobs: int,
    sweep: Sweep | None = None,
    controls: bool = True,
) -> str:
    """The command line of this comparison.

    Example:
        >>> command(["plain", "mine.yaml"], 3, "tokens", None, {"think": "PauseToken(pauses=1)"}, jobs=2)
        "pondera compare plain mine.yaml --seeds 3 --equal tokens --jobs 2 --think 'PauseToken(pauses=1)'"
    """
    words = ["pondera", "compare", *recipes, "--seeds", str(seeds), "--equal", equal]
    words += ["--flops", str(flops)] if flops is not None else []
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    words += str(sweep).split(" ") if sweep else []
    words += [] if controls else ["--no-controls"]
    for dotted, value in (overrides or {}).items():
        words += [f"--{dotted}", str(value)]
    return shlex.join(map(str, words))

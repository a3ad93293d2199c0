"""Trains the candidates on the same text at equal cost and seeds, and says what came out.

Runs are ordinary run folders under ``OUT/runs``; whatever is there already with the same config is reused, whatever was
interrupted is resumed, so a comparison can be stopped and started again, and widened by more recipes or seeds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pondera.ground.errors import Failure, UserError, unknown
from pondera.ground.run import Run, is_run, write_atomic
from pondera.ground.settings import RunConfig, load
from pondera.jobs.build import new_model, resolve
from pondera.jobs.price import price

EQUAL = ("tokens", "flops")
MEASURES = (
    "bits_per_byte",
    "loss",
    "perplexity",
    "passes_per_token",
    "inference_flops_per_token",
    "kv_bytes_per_token",
    "train_flops",
    "train_tokens",
    "train_seconds",
    "train_tokens_per_second",
    "parameters",
)


def compare(
    recipes: list[str],
    seeds: int = 3,
    equal: str = "tokens",
    flops: float | None = None,
    out: Path = Path("runs/compare"),
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains every recipe with every seed, then writes ``results.json`` and ``report.html`` into `out`.

    Args:
        recipes: names or YAML files; the first is the one that the others are measured against.
        seeds: how many seeds, from ``train.seed`` upwards.
        equal: ``"tokens"`` trains each for its own number of steps; ``"flops"`` sets the steps so that all spend the same
            training FLOPs.
        flops: that budget; none: what the first recipe spends in its own steps.
        out: where runs and results go.
        overrides: dotted settings applied to every recipe.
        progress: show what is being trained.
        jobs: runs trained side by side, each in a process with its share of the cores.

    Returns:
        ``{"equal", "seeds", "baseline", "rows": [...], "verdict": [...]}``; a row has the recipe's `name`, and for each
        measure a mean, a spread (sample standard deviation) and the value of each seed.

    Raises:
        UserError: a recipe that does not exist, two of one name, or a number that makes no sense.
    """
    if equal not in EQUAL:
        raise unknown("--equal", equal, EQUAL)
    if seeds < 1 or jobs < 1:
        raise UserError(f"--seeds {seeds}, --jobs {jobs}: give 1 or more")
    configs = [resolve(load(recipe, overrides)) for recipe in recipes]
    if len({config.name for config in configs}) < len(configs):
        raise UserError(f"compare: two of the recipes share a name ({', '.join(config.name for config in configs)})")
    if equal == "flops":
        configs = at_equal_flops(configs, flops)
    elif flops is not None:
        raise UserError("--flops sets the budget of --equal flops; add --equal flops, or leave it out")
    planned = [with_seed(config, config.train.seed + number) for number in range(seeds) for config in configs]
    folders = {folder_of(config, out): config for config in planned}
    train_all(folders, progress, jobs)
    result = summarise([config.name for config in configs], list(folders))
    result |= {"equal": equal, "seeds": seeds, "command": command(recipes, seeds, equal, flops, overrides)}
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    from pondera.jobs.report import write_report

    write_report(
        list(folders), out / "report.html", title=f"{', '.join(config.name for config in configs)} at equal {equal}"
    )
    return result


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same run with another seed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def folder_of(config: RunConfig, out: Path) -> Path:
    """Where a run of a comparison lives: its name, its length and its seed."""
    return out / "runs" / f"{config.name}-{config.train.steps}steps-seed{config.train.seed}"


def at_equal_flops(configs: list[RunConfig], budget: float | None) -> list[RunConfig]:
    """The configs with `train.steps` set so that each spends `budget` training FLOPs (or what the first one spends)."""
    per_step = [flops_per_step(config) for config in configs]
    budget = budget if budget is not None else per_step[0] * configs[0].train.steps
    equal = []
    for config, cost in zip(configs, per_step, strict=True):
        steps = round(budget / cost)
        if steps < 1:
            raise UserError(f"--flops {budget:.3g}: one step of {config.name} already costs {cost:.3g}")
        equal.append(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
    return equal


def flops_per_step(config: RunConfig) -> float:
    """Training FLOPs of one optimizer step, by arithmetic."""
    from pondera.ground.data import prepare

    model = new_model(config, prepare(config.data).vocab_size)
    return price(model, config.data.context)["training_flops_per_token"] * config.data.context * config.train.batch_size


def train_all(folders: dict[Path, RunConfig], progress: bool, jobs: int) -> None:
    """Trains what is not there yet; in this process, or several side by side in processes of their own."""
    missing = {folder: config for folder, config in folders.items() if not finished(folder, config)}
    if jobs == 1 or len(missing) < 2:
        from pondera.jobs.train import train

        for folder, config in missing.items():
            say(progress, f"training {folder.name}")
            train(config, folder, resume=is_run(folder), progress=progress)
        return
    # One tokenisation before many processes ask for it.
    from pondera.ground.data import prepare

    for config in missing.values():
        prepare(config.data)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(_train_apart, folder, config, threads) for folder, config in missing.items()]
        for folder, done in zip(missing, work, strict=True):
            done.result()
            say(progress, f"trained {folder.name}")


def finished(folder: Path, config: RunConfig) -> bool:
    """Whether this run is there and complete. One with another config is refused rather than mixed in."""
    if not is_run(folder):
        return False
    run = Run.open(folder)
    if run.config.to_dict() != config.to_dict():
        raise UserError(f"{folder}: holds a run with another config; choose another --out, or remove that folder")
    return run.result() is not None


def _train_apart(folder: Path, config: RunConfig, threads: int) -> None:
    import yaml

    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = folder.parent / f".{folder.name}.yaml"
    write_atomic(recipe, yaml.safe_dump(config.to_dict(), sort_keys=False))
    arguments = ["train", str(recipe), "--out", str(folder), *(["--resume"] if is_run(folder) else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "pondera", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    recipe.unlink(missing_ok=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Failure(f"{folder.name} failed: {said[-1] if said else f'exit code {done.returncode}'}")


def say(progress: bool, text: str) -> None:
    """One line on stderr."""
    if progress:
        print(text, file=sys.stderr, flush=True)


def summarise(names: Iterable[str], folders: list[Path]) -> dict[str, Any]:
    """Rows of means and spreads, each seed's difference to the baseline, and the verdict in words.

    Args:
        names: the recipes, baseline first.
        folders: finished run folders.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for folder in folders:
        run = Run.open(folder)
        runs[run.config.name].append(run)
    baseline = next(iter(runs))
    rows = [_row(name, members, runs[baseline]) for name, members in runs.items()]
    return {"baseline": baseline, "rows": rows, "verdict": [_verdict(row, baseline) for row in rows[1:]]}


def _row(name: str, members: list[Run], baseline: list[Run]) -> dict[str, Any]:
    by_seed = {run.config.train.seed: run.result() or {} for run in members}
    base = {run.config.train.seed: run.result() or {} for run in baseline}
    row: dict[str, Any] = {"name": name, "seeds": list(by_seed), "steps": members[0].config.train.steps}
    for measure in MEASURES:
        row[measure] = spread([result.get(measure) for result in by_seed.values()])
    gains = [result["bits_per_byte"] - base[seed]["bits_per_byte"] for seed, result in by_seed.items()]
    row["bits_per_byte_against_baseline"] = spread(gains)
    return row


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (none for one value) and the values."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "spread": None, "values": values}
    return {
        "mean": statistics.fmean(known),
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": values,
    }


def _verdict(row: dict[str, Any], baseline: str) -> str:
    """One sentence on the paired differences: the same seed sees the same windows in the same order."""
    gap = row["bits_per_byte_against_baseline"]
    size, error = abs(gap["mean"]), gap["spread"]
    side = "below" if gap["mean"] < 0 else "above"
    said = f"{row['name']} is {size:.3f} bits per byte {side} {baseline}"
    if error is None:
        return f"{said}; one seed, so this may be luck."
    same_sign = all((value < 0) == (gap["mean"] < 0) for value in gap["values"])
    if not same_sign or size < 2 * error / len(gap["values"]) ** 0.5:
        return f"{said}, which is inside the noise of {len(gap['values'])} seeds (± {error:.3f})."
    return f"{said} (± {error:.3f} over {len(gap['values'])} seeds, every seed the same way)."


def command(recipes: list[str], seeds: int, equal: str, flops: float | None, overrides: dict[str, Any] | None) -> str:
    """The command line that does this comparison."""
    words = ["pondera", "compare", *recipes, "--seeds", str(seeds), "--equal", equal]
    words += ["--flops", f"{flops:g}"] if flops is not None else []
    for dotted, value in (overrides or {}).items():
        words += [f"--{dotted}", str(value)]
    return " ".join(words)

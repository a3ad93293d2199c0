"""Trains the candidates on the same text at equal cost and seeds, and says what came out.

Runs are ordinary run folders under ``OUT/runs``; whatever is there already with the same config is reused, whatever was
interrupted is resumed, so a comparison can be stopped and started again, and widened by more recipes or seeds. Beside
them, ``OUT/configs`` and ``OUT/logs`` hold what runs in processes of their own were started with, and what they said.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pondera.core.errors import Failure, Interrupted, UserError, unknown
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import Run, is_run, write_atomic
from pondera.evaluation import significance
from pondera.evaluation.cost_report import cost_report
from pondera.training.build import new_model, resolve

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
OLD_NAMES = {"train_tokens_per_second": "tokens_per_second"}
"""What runs of earlier versions call a measure."""


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
        ``{"equal", "seeds", "command", "baseline", "rows": [...], "verdict": [...]}``; a row has the recipe's `name`,
        its `runs` (folders below `out`), and for each measure a mean, a spread (sample standard deviation) and the value
        of each seed.

    Raises:
        UserError: a recipe that does not exist, two of one name, a number that makes no sense, or a folder in `out` that
            holds a run of something else.
        Failure: a training failed; the others were stopped and saved.
        Interrupted: SIGINT or SIGTERM came; what was trained so far is kept.
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
    typed = command(recipes, seeds, equal, flops, overrides, jobs)
    try:
        train_all(folders, progress, jobs)
    except (Interrupted, KeyboardInterrupt):
        again = f"{typed} --out {shlex.quote(str(out))}"
        raise Interrupted(f"stopped; what was trained so far is kept, go on with:\n{again}") from None
    result = summarise([config.name for config in configs], list(folders))
    result |= {"equal": equal, "seeds": seeds, "command": typed}
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    from pondera.report.page import write_report

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
    from pondera.data.corpus import prepare

    model = new_model(config, prepare(config.data).vocab_size)
    per_token = cost_report(model, config.data.context, config.train.gradient_checkpointing)["training_flops_per_token"]
    return per_token * config.data.context * config.train.batch_size


def train_all(folders: dict[Path, RunConfig], progress: bool, jobs: int) -> None:
    """Trains what is not there yet; in this process, or several side by side in processes of their own."""
    from pondera.data.corpus import prepare

    texts = {repr(config.data): config.data for config in folders.values()}
    digests = {key: prepare(data).digest for key, data in texts.items()}
    missing = {
        folder: config for folder, config in folders.items() if not finished(folder, config, digests[repr(config.data)])
    }
    if jobs > 1 and len(missing) > 1:
        _train_apart(missing, jobs, progress)
        return
    from pondera.training.train import train

    for folder, config in missing.items():
        say(progress, f"training {folder.name}")
        train(config, folder, resume=is_run(folder), progress=progress)


def finished(folder: Path, config: RunConfig, digest: str) -> bool:
    """Whether this run is there and complete. One with another config or text is refused rather than mixed in.

    Args:
        folder: where it would be.
        config: what it should have been trained with.
        digest: of the corpus that `config` stands for today.
    """
    if not is_run(folder):
        return False
    run, advice = Run.open(folder), "choose another --out, or remove that folder"
    if run.config.to_dict() != config.to_dict():
        raise UserError(f"{folder}: holds a run with another config; {advice}")
    result = run.result()
    if result is not None and result.get("corpus", digest) != digest:
        raise UserError(f"{folder}: holds a run on another text, or {config.data.text!r} has changed since; {advice}")
    return result is not None


def _train_apart(missing: dict[Path, RunConfig], jobs: int, progress: bool) -> None:
    """Trains each run in a process of its own, `jobs` at a time; when one fails, or we are asked to stop, all end."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, running = list(missing), dict[Path, subprocess.Popen]()
    with _noticed_signals() as noticed:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    say(progress, f"training {folder.name}")
                    running[folder] = _start(folder, missing[folder], threads)
                time.sleep(0.1)
                for folder in [folder for folder, child in running.items() if child.poll() is not None]:
                    code = running.pop(folder).returncode
                    if code:
                        say(progress and bool(running), f"{folder.name} ended early; stopping the others")
                        raise ended_early(folder, code)
                    say(progress, f"trained {folder.name}")
                if noticed:
                    raise Interrupted("stopped")
        finally:
            _stop(list(running.values()))


def _start(folder: Path, config: RunConfig, threads: int) -> subprocess.Popen:
    """`pondera train` on a config that stays, so that the command in the run's env.json can be typed again."""
    import yaml

    recipe, log = (_beside(folder, kind) for kind in ("configs", "logs"))
    for path in (recipe, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    words = ["train", str(recipe), "--out", str(folder), *(["--resume"] if is_run(folder) else [])]
    with open(log, "wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "pondera", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            process_group=0,  # Ctrl-C reaches us alone; a child would take our signal for the second, which loses its step
        )


def _beside(folder: Path, kind: str) -> Path:
    return folder.parents[1] / kind / f"{folder.name}.{'yaml' if kind == 'configs' else 'txt'}"


def ended_early(folder: Path, code: int) -> Exception:
    """What to raise when the training process of `folder` ended with this exit code, with its own last words."""
    log = _beside(folder, "logs")
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    # What `pondera` says at its end may take several lines.
    last = max((number for number, line in enumerate(lines) if line.startswith("pondera: ")), default=len(lines) - 1)
    said = "\n".join(lines[last:]).removeprefix("pondera: ")
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        return Interrupted(f"{folder} was interrupted")
    kind = UserError if code == 2 else Failure
    return kind(f"{folder}: {said}\n(all that it said: {log})")


def _stop(children: list[subprocess.Popen]) -> None:
    """Has children finish their step and save, and waits for them; interrupted once more, ends them at once."""
    try:
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
    finally:
        for child in children:
            child.kill()


@contextmanager
def _noticed_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; the second one does what it always does."""
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return

    def notice(number: int, _: Any) -> None:
        noticed.append(number)
        restore()

    def restore() -> None:
        for number, before in previous.items():
            signal.signal(number, before)

    previous = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noticed
    finally:
        restore()


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
    gaps = [significance.gap(_scores(runs[name]), _scores(runs[baseline])) for name in runs]
    said = [
        significance.sentence(name, baseline, found, "bits per byte") for name, found in zip(runs, gaps, strict=True)
    ]
    return {"baseline": baseline, "rows": rows, "verdict": said[1:] + _at_equal_inference(rows, runs)}


def _at_equal_inference(rows: list[dict[str, Any]], runs: dict[str, list[Run]]) -> list[str]:
    """Recipes that cost about the same per token against the first of their price, where that is not the baseline."""
    said, leaders = [], rows[:1]
    for row in rows[1:]:
        cost = row["inference_flops_per_token"]["mean"]
        leader = next(
            (first for first in leaders if _about_equal(first["inference_flops_per_token"]["mean"], cost)), None
        )
        if leader is None:
            leaders.append(row)
        elif leader is not rows[0]:
            found = significance.gap(_scores(runs[row["name"]]), _scores(runs[leader["name"]]))
            said.append(
                f"At about equal inference FLOPs, {significance.sentence(row['name'], leader['name'], found, 'bits per byte')}"
            )
    return said


def _about_equal(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and max(one, other) <= 1.15 * min(one, other)


def _row(name: str, members: list[Run], baseline: list[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "seeds": [run.config.train.seed for run in members],
        "runs": [f"{run.path.parent.name}/{run.path.name}" for run in members],
        "steps": members[0].config.train.steps,
    }
    results = [run.result() or {} for run in members]
    for measure in MEASURES:
        old = OLD_NAMES.get(measure, measure)
        row[measure] = spread([result.get(measure, result.get(old)) for result in results])
    base = _scores(baseline)
    row["bits_per_byte_against_baseline"] = spread([score - base[seed] for seed, score in _scores(members).items()])
    return row


def _scores(runs: list[Run]) -> dict[int, float]:
    """Bits per byte by seed."""
    return {run.config.train.seed: (run.result() or {})["bits_per_byte"] for run in runs}


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


def command(
    recipes: list[str], seeds: int, equal: str, flops: float | None, overrides: dict[str, Any] | None, jobs: int
) -> str:
    """The command line that does this comparison.

    Example:
        >>> command(["plain", "mine.yaml"], 3, "tokens", None, {"think": "PauseToken(pauses=1)"}, jobs=2)
        "pondera compare plain mine.yaml --seeds 3 --equal tokens --jobs 2 --think 'PauseToken(pauses=1)'"
    """
    words = ["pondera", "compare", *recipes, "--seeds", str(seeds), "--equal", equal]
    words += ["--flops", str(flops)] if flops is not None else []
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    for dotted, value in (overrides or {}).items():
        words += [f"--{dotted}", str(value)]
    return shlex.join(map(str, words))

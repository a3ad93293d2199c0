"""`compare`: trains several variants on the same text at equal cost, with the same seeds, and reports the differences.

Runs are ordinary run folders under ``OUT/runs``. Finished runs with the same config are reused and interrupted runs are
resumed, so a comparison can be stopped, started again and extended by variants or seeds. Runs that train in processes of
their own read their config from ``OUT/configs`` and write their output to ``OUT/logs``.
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
from pondera.core.metric import SCORES, score_name
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import Run, is_run, write_atomic
from pondera.evaluation import significance
from pondera.evaluation.cost_report import cost_report
from pondera.training.build import new_model, resolve

EQUAL = ("tokens", "flops")
MEASURES = (
    "bits_per_byte",
    "error",
    "accuracy",
    "loss",
    "perplexity",
    "passes_per_token",
    "passes_correlation",
    "inference_flops_per_token",
    "kv_bytes_per_token",
    "train_flops",
    "train_tokens",
    "train_seconds",
    "train_tokens_per_second",
    "parameters",
)
OLD_NAMES = {"train_tokens_per_second": "tokens_per_second"}
"""The names of measures in runs of earlier versions."""


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

    Returns:
        ``{"equal", "seeds", "command", "baseline", "rows": [...], "verdict": [...]}``; a row has the `name` of the
        variant, its `runs` (folders below `out`), and for each measure the mean, the spread (sample standard deviation)
        and the value of each seed.

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
    configs = [resolve(load(recipe, overrides)) for recipe in recipes]
    if len({config.name for config in configs}) < len(configs):
        raise UserError(
            f"compare: two recipes have the same name ({', '.join(config.name for config in configs)}); give each its own"
        )
    if equal == "flops":
        configs = at_equal_flops(configs, flops)
    elif flops is not None:
        raise UserError("--flops sets the budget of --equal flops; add --equal flops, or leave --flops out")
    planned = [with_seed(config, config.train.seed + number) for number in range(seeds) for config in configs]
    folders = {folder_of(config, out): config for config in planned}
    typed = command(recipes, seeds, equal, flops, overrides, jobs)
    try:
        train_all(folders, progress, jobs)
    except (Interrupted, KeyboardInterrupt):
        again = f"{typed} --out {shlex.quote(str(out))}"
        raise Interrupted(f"stopped; the runs so far are kept; continue with:\n{again}") from None
    result = summarise([config.name for config in configs], list(folders))
    result |= {"equal": equal, "seeds": seeds, "command": typed}
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    from pondera.report.page import write_report

    write_report(
        list(folders), out / "report.html", title=f"{', '.join(config.name for config in configs)} at equal {equal}"
    )
    return result


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same config with another seed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def folder_of(config: RunConfig, out: Path) -> Path:
    """The folder of a run in a comparison: named by variant, steps and seed."""
    return out / "runs" / f"{config.name}-{config.train.steps}steps-seed{config.train.seed}"


def at_equal_flops(configs: list[RunConfig], budget: float | None) -> list[RunConfig]:
    """Sets `train.steps` so that each config spends `budget` training FLOPs (default: those of the first config)."""
    per_step = [flops_per_step(config) for config in configs]
    budget = budget if budget is not None else per_step[0] * configs[0].train.steps
    equal = []
    for config, cost in zip(configs, per_step, strict=True):
        steps = round(budget / cost)
        if steps < 1:
            raise UserError(f"--flops {budget:.3g}: one step of {config.name} costs {cost:.3g}; give a larger budget")
        equal.append(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
    return equal


def flops_per_step(config: RunConfig) -> float:
    """Analytic training FLOPs of one optimizer step."""
    from pondera.data.corpus import prepare

    model = new_model(config, prepare(config.data).vocab_size)
    per_token = cost_report(model, config.data.context, config.train.gradient_checkpointing)["training_flops_per_token"]
    return per_token * config.data.context * config.train.batch_size


def train_all(folders: dict[Path, RunConfig], progress: bool, jobs: int) -> None:
    """Trains the missing runs: in this process, or `jobs` at a time in processes of their own."""
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
    """Whether the run exists and is complete; refuses a run with another config or text.

    Args:
        folder: the folder of the run.
        config: the expected config.
        digest: the digest of the current corpus of `config`.
    """
    if not is_run(folder):
        return False
    run, advice = Run.open(folder), "use another --out, or remove that folder"
    if run.config.to_dict() != config.to_dict():
        raise UserError(f"{folder}: contains a run with another config; {advice}")
    result = run.result()
    if result is not None and result.get("corpus", digest) != digest:
        raise UserError(f"{folder}: contains a run on another text, or {config.data.text!r} has changed; {advice}")
    return result is not None


def _train_apart(missing: dict[Path, RunConfig], jobs: int, progress: bool) -> None:
    """Trains each run in a process of its own, `jobs` at a time; a failure or a signal stops all of them."""
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
    """Starts `pondera train` on a config file that is kept, so that the command in the run's env.json works again."""
    import yaml

    recipe, log = (_beside(folder, kind) for kind in ("configs", "logs"))
    for path in (recipe, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    words = ["train", str(recipe), "--out", str(folder), *(["--resume"] if is_run(folder) else [])]
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pondera", *words],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # otherwise Ctrl-C reaches the child twice (directly and from us), and it loses its step
        )


def _beside(folder: Path, kind: str) -> Path:
    return folder.parents[1] / kind / f"{folder.name}.{'yaml' if kind == 'configs' else 'txt'}"


def ended_early(folder: Path, code: int) -> Exception:
    """The exception for a training process that ended with this exit code, with the last message of its log."""
    log = _beside(folder, "logs")
    lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
    # The last message may have several lines.
    last = max((number for number, line in enumerate(lines) if line.startswith("pondera: ")), default=len(lines) - 1)
    message = "\n".join(lines[last:]).removeprefix("pondera: ")
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        return Interrupted(f"{folder} was interrupted")
    kind = UserError if code == 2 else Failure
    return kind(f"{folder}: {message}\n(full log: {log})")


def _stop(children: list[subprocess.Popen]) -> None:
    """Asks the children to finish their step and save, and waits; another interrupt kills them."""
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
    """A list that receives the first SIGINT or SIGTERM; the second one has its normal effect."""
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
    """Prints one line to stderr."""
    if progress:
        print(text, file=sys.stderr, flush=True)


def summarise(names: Iterable[str], folders: list[Path]) -> dict[str, Any]:
    """The rows of a comparison, with means, spreads and differences to the baseline, and its verdict as sentences.

    Args:
        names: the variants, baseline first.
        folders: finished run folders.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for folder in folders:
        run = Run.open(folder)
        runs[run.config.name].append(run)
    baseline, key = next(iter(runs)), score_name([run.result() or {} for members in runs.values() for run in members])
    rows = [_row(name, members, runs[baseline], key) for name, members in runs.items()]
    gaps = [significance.gap(_scores(runs[name], key), _scores(runs[baseline], key)) for name in runs]
    verdict = [
        significance.sentence(name, baseline, difference, SCORES[key])
        for name, difference in zip(runs, gaps, strict=True)
    ]
    return {
        "baseline": baseline,
        "score": key,
        "rows": rows,
        "verdict": verdict[1:] + _at_equal_inference(rows, runs, key),
    }


def _at_equal_inference(rows: list[dict[str, Any]], runs: dict[str, list[Run]], key: str) -> list[str]:
    """Compares variants of about equal inference FLOPs with the first of them, unless that is the baseline."""
    verdict, leaders = [], rows[:1]
    for row in rows[1:]:
        cost = row["inference_flops_per_token"]["mean"]
        leader = next(
            (first for first in leaders if _about_equal(first["inference_flops_per_token"]["mean"], cost)), None
        )
        if leader is None:
            leaders.append(row)
        elif leader is not rows[0]:
            difference = significance.gap(_scores(runs[row["name"]], key), _scores(runs[leader["name"]], key))
            sentence = significance.sentence(row["name"], leader["name"], difference, SCORES[key])
            verdict.append(f"At about equal inference FLOPs, {sentence}")
    return verdict


def _about_equal(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and max(one, other) <= 1.15 * min(one, other)


def _row(name: str, members: list[Run], baseline: list[Run], key: str) -> dict[str, Any]:
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
    base = _scores(baseline, key)
    row[f"{key}_against_baseline"] = spread([score - base[seed] for seed, score in _scores(members, key).items()])
    if key == "error":
        row["by_difficulty"] = [result["by_difficulty"] for result in results]
    return row


def _scores(runs: list[Run], key: str) -> dict[int, float]:
    """The score `key` by seed."""
    return {run.config.train.seed: (run.result() or {})[key] for run in runs}


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (`None` for a single value) and the values."""
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
    """The command line of this comparison.

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

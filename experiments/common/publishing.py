"""Code that the experiments share: arguments, the GPU scale, recipe files, and publishing results without weights."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pondera.core.errors import Interrupted
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run, write_atomic
from tools.results import add_runs

GPU = {
    "backbone.hidden_size": 512,
    "backbone.intermediate_size": 1408,
    "backbone.num_hidden_layers": 8,
    "backbone.num_attention_heads": 8,
    "backbone.num_key_value_heads": 8,
    "data.tokenizer": "bpe-8192",
    "data.context": 512,
    "train.steps": 3200,
    "train.batch_size": 64,
    "train.lr": 1e-3,
    "train.dtype": "bfloat16",
    "train.eval_tokens": 524288,
    "train.eval_every": 400,
    "train.save_every": 200,
}
"""34M parameters, 105M tokens."""
SMOKE = {
    "backbone.hidden_size": 32,
    "backbone.intermediate_size": 64,
    "data.max_bytes": 400_000,
    "data.tokenizer": "bpe-300",
    "train.steps": 4,
    "train.batch_size": 2,
    "train.eval_tokens": 512,
    "train.eval_every": 4,
    "train.save_every": 4,
}
"""Overrides for a smoke test at any scale: they run every line of an experiment. The numbers mean nothing."""
COPIED = ("metrics.jsonl", "result.json", "traces/depths.json")
SEEDS = 3


@dataclass(frozen=True)
class Experiment:
    """The settings and folders of an experiment.

    Args:
        out: the folder of the runs.
        results: the folder that is committed.
        overrides: dotted settings of every variant.
        seeds: the number of seeds of each variant.
        jobs: the number of runs in parallel.
        command: the command that repeats the experiment, without local paths.
    """

    out: Path
    results: Path
    overrides: dict[str, Any]
    seeds: int
    jobs: int
    command: str


def arguments(doc: str | None, scales: list[str]) -> argparse.ArgumentParser:
    """The arguments of every experiment."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(scales), required=True)
    parser.add_argument("--text", default="stdlib", help="as data.text (default: stdlib)")
    parser.add_argument("--name", help="name of the results folder (default: from the text)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the scale)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs in parallel (gpu: 1)")
    parser.add_argument("--smoke", action="store_true", help="4 tiny steps and one seed, to runs/smoke/ only")
    parser.add_argument("--minutes", type=float, help="stop and save after this time; call again to continue")
    return parser


def plan(args: argparse.Namespace, kind: str, settings: dict[str, Any], further: tuple[str, ...] = ()) -> Experiment:
    """The plan of an experiment from the common arguments.

    Args:
        args: the parsed arguments.
        kind: the name of the experiment's folder, and of the folders of its runs and results.
        settings: the dotted settings of the scale.
        further: additional words of the command of this experiment.
    """
    name = args.name or Path(args.text).name.split(".")[0]
    words = ["python", "-m", f"experiments.{kind}.run", "--scale", args.scale]
    words += [] if "data.task" in settings else ["--text", Path(args.text).name]
    words += ["--name", name]
    words += ["--steps", str(args.steps)] if args.steps else []
    words += ["--seeds", str(args.seeds)] if args.seeds != SEEDS else []
    overrides = {**settings, "data.text": args.text} | ({"train.steps": args.steps} if args.steps else {})
    if args.smoke:
        words.append("--smoke")
        overrides |= SMOKE
    root = Path("runs/smoke") if args.smoke else Path()
    return Experiment(
        out=root / "runs" / kind / f"{name}-{args.scale}",
        results=root / "results" / kind / f"{name}-{args.scale}",
        overrides=overrides,
        seeds=1 if args.smoke else args.seeds,
        jobs=1 if args.scale == "gpu" else args.jobs,
        command=shlex.join([*words, *further]),
    )


@contextmanager
def in_pieces(minutes: float | None) -> Iterator[None]:
    """Stops after some minutes, or on an interrupt, with everything saved; prints "done" at the end."""
    if minutes:
        stop_after(minutes)
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        print("stopped and saved; call it again to continue", file=sys.stderr)
        sys.exit(130)
    print("done")


def write_recipe(config: RunConfig, folder: Path) -> str:
    """Writes the config of a variant as a file with its name, for `compare`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.yaml"
    write_atomic(path, yaml.safe_dump(config.to_dict(), sort_keys=False))
    return str(path)


def publish(out: Path, results: Path, equal: str, command: str) -> None:
    """Publishes the records of the runs, without weights and without local paths.

    Args:
        out: the folder of the comparison.
        results: the folder to write to; runs published there before are kept.
        equal: the name of the file for the numbers of the comparison.
        command: the command that produces them.
    """
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{equal}.json", json.loads((out / "results.json").read_text()) | {"command": command})
    with tempfile.TemporaryDirectory() as scratch:
        for run in map(Run, sorted((out / "runs").iterdir())):
            if run.result_file.is_file():
                _copy(run, Path(scratch) / run.path.name, command)
        add_runs(Path(scratch), results)


def _copy(run: Run, target: Path, command: str) -> None:
    target.mkdir()
    for name in filter(lambda name: (run.path / name).is_file(), COPIED):
        shutil.copy(run.path / name, target / Path(name).name)
    config = run.config.to_dict()
    for name in ("text", "tokenizer"):
        config["data"][name] = portable(config["data"][name])
    if isinstance(config["backbone"], str):
        config["backbone"] = portable(config["backbone"])
    write_atomic(target / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    # A run that was trained in a process of its own recorded its own command.
    typed = run.env["command"] if run.env["command"].startswith("pondera ") else command
    write_json(target / "env.json", run.env | {"command": shlex.join(map(portable, shlex.split(typed)))})


def portable(word: str) -> str:
    """The last part of an absolute path; any other word unchanged."""
    return Path(word).name if Path(word).is_absolute() else word


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def stop_after(minutes: float) -> None:
    """Interrupts this process after some minutes; training then finishes its step and saves."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs of shell scripts ignore SIGINT by default
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)

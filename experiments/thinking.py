"""Does thinking pay at equal cost? The experiment behind the tables of the README.

    python experiments/thinking.py --scale cpu --text books.jsonl.xz     about an hour on two cores
    python experiments/thinking.py --scale gpu --text books.jsonl.xz     one GPU; call it again until it says "done"

Arms: plain; twice the depth (as many inference FLOPs as one thought per token); adaptive latent CoT with one step;
pause tokens (as many slots, constant input); PonderLM-2 with one thought. Each with three seeds, first at equal tokens,
then at equal training FLOPs (the budget is what twice the depth spends). Everything is resumable: what is finished is
reused, what was interrupted goes on from its checkpoint, and with ``--minutes`` a call stops by itself in time.
What it learned is copied to ``results/thinking/``: settings, metrics and results of every run, without weights and
without the paths of the machine that it ran on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from pondera.ground.errors import Interrupted
from pondera.ground.run import Run, write_atomic
from pondera.ground.settings import load
from pondera.jobs.compare import compare
from pondera.jobs.demo import SETTINGS

ARMS = ["plain", "doubledepth", "adaptivelatentcot", "pausetoken", "ponderlm2"]
AT_EQUAL_FLOPS = ["doubledepth", "plain", "adaptivelatentcot", "pausetoken", "ponderlm2"]
SCALES = {
    "cpu": {"train.steps": 400, "train.eval_tokens": 65536, "train.eval_every": 200, "train.save_every": 200},
    # As short as the demo, whose runs it shares.
    "demo": SETTINGS,
    # 34M parameters, 105M tokens.
    "gpu": {
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
    },
}
SEEDS = 3
EQUAL = ["tokens", "flops"]
COPIED = ("metrics.jsonl", "result.json")


def publish(out: Path, results: Path, equal: str, command: str) -> None:
    """Copies what the runs say about themselves, without weights and without this machine's paths.

    Args:
        out: of the comparison.
        results: where to.
        equal: names the file of the comparison's numbers.
        command: what to type to get them.
    """
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{equal}.json", json.loads((out / "results.json").read_text()) | {"command": command})
    for run in map(Run, sorted((out / "runs").iterdir())):
        if run.result_file.is_file():
            target = results / "runs" / run.path.name
            target.mkdir(parents=True, exist_ok=True)
            for name in COPIED:
                shutil.copy(run.path / name, target / name)
            config = run.config.to_dict()
            config["data"]["text"] = portable(config["data"]["text"])
            write_atomic(target / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            # Trained in a process of its own, a run has a command of its own.
            typed = run.env["command"] if run.env["command"].startswith("pondera ") else command
            words = map(portable, shlex.split(typed))
            write_json(target / "env.json", run.env | {"command": shlex.join(words)})


def portable(word: str) -> str:
    """An absolute path's last part; everything else as it is."""
    return Path(word).name if Path(word).is_absolute() else word


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def command_line(args: argparse.Namespace, name: str) -> str:
    """What to type to do all this again, wherever the text lies."""
    words = ["python", "experiments/thinking.py", "--scale", args.scale, "--text", Path(args.text).name, "--name", name]
    words += ["--steps", str(args.steps)] if args.steps else []
    words += ["--seeds", str(args.seeds)] if args.seeds != SEEDS else []
    words += ["--equal", *args.equal] if args.equal != EQUAL else []
    return shlex.join(words)


def stop_after(minutes: float) -> None:
    """Has this process interrupt itself in time, which finishes and saves the steps that are being trained."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell script's background jobs ignore it
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def write_recipes(overrides: dict[str, Any], folder: Path) -> dict[str, str]:
    """The arms at this scale as YAML files; twice the depth is twice whatever depth the others have."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for arm in ARMS:
        config = load(arm, overrides)
        if arm == "doubledepth":
            config.backbone["num_hidden_layers"] = 2 * load("plain", overrides).backbone["num_hidden_layers"]
        paths[arm] = str(folder / f"{arm}.yaml")
        write_atomic(Path(paths[arm]), yaml.safe_dump(config.to_dict(), sort_keys=False))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), required=True)
    parser.add_argument("--text", default="stdlib", help="as data.text (default: stdlib)")
    parser.add_argument("--name", help="of the folder under results/thinking (default: the text's)")
    parser.add_argument("--steps", type=int, help="another length")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--equal", nargs="+", choices=EQUAL, default=EQUAL)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side (gpu: 1)")
    parser.add_argument("--minutes", type=float, help="stop and save after so long; call again to go on")
    args = parser.parse_args()
    if args.minutes:
        stop_after(args.minutes)
    name = args.name or Path(args.text).name.split(".")[0]
    out, results = Path("runs/thinking") / f"{name}-{args.scale}", Path("results/thinking") / f"{name}-{args.scale}"
    overrides = {**SCALES[args.scale], "data.text": args.text}
    if args.steps:
        overrides["train.steps"] = args.steps
    paths = write_recipes(overrides, out / "recipes")
    recipes = {"tokens": ARMS, "flops": AT_EQUAL_FLOPS}
    jobs = args.jobs if args.scale != "gpu" else 1
    try:
        for equal in args.equal:
            found = compare([paths[arm] for arm in recipes[equal]], args.seeds, equal, None, out, jobs=jobs)
            publish(out, results, equal, command_line(args, name))
            print(f"equal {equal}:", *found["verdict"], sep="\n  ")
    except (Interrupted, KeyboardInterrupt):
        print("stopped in time; call it again to go on", file=sys.stderr)
        sys.exit(130)
    print("done")


if __name__ == "__main__":
    main()

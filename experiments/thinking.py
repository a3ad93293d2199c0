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
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from publishing import GPU, publish, stop_after, write_recipe

from pondera.ground.errors import Interrupted
from pondera.ground.settings import load
from pondera.jobs.compare import compare
from pondera.jobs.demo import SETTINGS

ARMS = ["plain", "doubledepth", "adaptivelatentcot", "pausetoken", "ponderlm2"]
AT_EQUAL_FLOPS = ["doubledepth", "plain", "adaptivelatentcot", "pausetoken", "ponderlm2"]
SCALES = {
    "cpu": {"train.steps": 400, "train.eval_tokens": 65536, "train.eval_every": 200, "train.save_every": 200},
    # As short as the demo, whose runs it shares.
    "demo": SETTINGS,
    "gpu": GPU,
}
SEEDS = 3
EQUAL = ["tokens", "flops"]


def command_line(args: argparse.Namespace, name: str) -> str:
    """What to type to do all this again, wherever the text lies."""
    words = ["python", "experiments/thinking.py", "--scale", args.scale, "--text", Path(args.text).name, "--name", name]
    words += ["--steps", str(args.steps)] if args.steps else []
    words += ["--seeds", str(args.seeds)] if args.seeds != SEEDS else []
    words += ["--equal", *args.equal] if args.equal != EQUAL else []
    return shlex.join(words)


def write_recipes(overrides: dict[str, Any], folder: Path) -> dict[str, str]:
    """The arms at this scale as YAML files; twice the depth is twice whatever depth the others have."""
    paths = {}
    for arm in ARMS:
        config = load(arm, overrides)
        if arm == "doubledepth":
            config.backbone["num_hidden_layers"] = 2 * load("plain", overrides).backbone["num_hidden_layers"]
        paths[arm] = write_recipe(config, folder)
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

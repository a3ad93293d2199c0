"""When does thinking pay? Accuracy and passes on a task that says how many serial steps each token needs.

    python -m experiments.tracking.run --scale cpu      on two cores; resumable
    python -m experiments.tracking.run --scale cpu --minutes 8.5      call it again until it says "done"
    python -m experiments.tracking.run --scale cpu --task "Copying()" --name copying --groups control
    python -m experiments.tracking.run --scale cpu --smoke      a check that it runs

The task is state tracking in the group S3 with resets: the difficulty of a token is the number of elements since the last
reset. The learning rate of every variant is tuned first, with a seed that is not compared. Two groups of variants are
published to ``results/tracking/``: methods of fixed depth beside deeper plain models, and methods that decide the passes of
each token, each with its random control, and a model that knows the difficulty. The third group compares at equal training
FLOPs, the fourth is for tasks in which serial steps do not help.
"""

from __future__ import annotations

import argparse
from typing import Any

from experiments.common.publishing import arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.sweep import Sweep
from pondera.core.run_config import load

TASK = "StateTracking(group='S3', reset=0.25)"
SCALES: dict[str, dict[str, Any]] = {"cpu": {}}
RATES = (2e-3, 4e-3)
KNOWN = {"data.known_difficulty": True}
EQUAL_PARAMETERS = {"backbone.num_hidden_layers": 2, "backbone.hidden_size": 48, "backbone.intermediate_size": 112}
"""Two layers with about the parameters of one layer of width 64."""

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "fixed": {
        "plain": {},
        "doubledepth": {"backbone.num_hidden_layers": 2},
        "doubledepth-stock": {"backbone.num_hidden_layers": 2, "init": "hf", "train.weight_decay": 0.01},
        "doubledepth-thin": EQUAL_PARAMETERS,
        "latentcot": {"think": "AdaptiveLatentCoT(steps=1, halting='fixed')"},
        "latentcot-3": {"think": "AdaptiveLatentCoT(steps=3, halting='fixed')"},
        "universal-3": {"think": "UniversalTransformer(steps=3, halting='fixed')"},
        "ponderlm2": {"think": "PonderLM2(thoughts=1)"},
    },
    "deciding": {
        "plain": {},
        "latentcot-known": {"think": "AdaptiveLatentCoT(steps=3, halting='fixed')", **KNOWN},
        "adaptivelatentcot": {"think": "AdaptiveLatentCoT(steps=3, penalty=0.03)"},
        "universaltransformer": {"think": "UniversalTransformer(steps=3)"},
        "ponderlm3": {"think": "PonderLM3(thoughts=1)"},
        "adaponderlm": {"think": "AdaPonderLM(steps=3, rank='pass', bottom=0.5)"},
        "adaponderlm-all": {"think": "AdaPonderLM(steps=3, rank='all', bottom=0.1)"},
    },
    "training": {
        "doubledepth-long": {"backbone.num_hidden_layers": 2, "train.steps": 4980},
        "ponderlm2": {"think": "PonderLM2(thoughts=1)"},
    },
    "control": {
        "plain": {},
        "doubledepth": {"backbone.num_hidden_layers": 2},
        "ponderlm2": {"think": "PonderLM2(thoughts=1)"},
    },
}
"""Settings of each variant beside those of the recipe plain on a task."""


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.set_defaults(name="s3-resets")
    parser.add_argument("--task", default=TASK, help=f"as data.task (default: {TASK})")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["fixed", "deciding", "training"])
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """Trains and publishes the groups."""
    further = () if args.task == TASK else ("--task", args.task, "--groups", *args.groups)
    it = plan(args, "tracking", SCALES[args.scale] | {"data.task": args.task}, further)
    with in_pieces(args.minutes):
        for group in args.groups:
            paths = [
                write_recipe(load("plain", it.overrides | settings | {"name": name}), it.out / "recipes")
                for name, settings in GROUPS[group].items()
            ]
            sweep = None if args.smoke else Sweep("train.lr", RATES)
            found = compare(paths, it.seeds, "tokens", None, it.out, jobs=it.jobs, sweep=sweep)
            publish(it.out, it.results, group, it.command)
            print(f"{group}:", *found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

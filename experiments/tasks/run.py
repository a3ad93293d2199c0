"""On which tasks do thoughts, passes and layers help? Serial tasks of several kinds, and two controls.

    python -m experiments.tasks.run --scale cpu      on two cores; resumable
    python -m experiments.tasks.run --scale cpu --minutes 8.5      call it again until it says "done"
    python -m experiments.tasks.run --scale cpu --name parity      one task only
    python -m experiments.tasks.run --scale cpu --smoke      a check that it runs

On each task four recipes are trained for an equal and small number of updates, at the learning rate of the recipes: one layer,
two layers, one latent thought that later tokens attend to (PonderLM-2), and up to three latent steps with a router. Each task
has its own folder in ``results/tasks/``.
"""

from __future__ import annotations

import argparse
from typing import Any

from experiments.common.publishing import arguments, in_pieces, plan, publish
from pondera.comparison.compare import compare
from pondera.core.errors import unknown

SCALES: dict[str, dict[str, Any]] = {"cpu": {"train.steps": 250, "train.eval_every": 400, "train.save_every": 400}}
TASKS: dict[str, dict[str, Any]] = {
    "a5": {"data.task": "StateTracking('A5', reset=0.25, generators=True)", "train.steps": 400},
    "parity": {"data.task": "StateTracking('parity', reset=0.1)"},
    "pointers": {"data.task": "PointerChasing(nodes=4, hops=2)", "train.steps": 6000},
    "expressions": {"data.task": "ModularExpression(modulus=5, depth=3, branch=0.0)", "train.steps": 1500},
    "copying": {"data.task": "Copying(letters=64)"},
    "recall": {"data.task": "AssociativeRecall(pairs=4, values=8)"},
}
"""Settings of each task beside those of the recipes on a task; the windows have 16 tokens."""
RECIPES = ["plain", "doubledepth", "ponderlm2", "adaptivelatentcot"]


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    args = parser.parse_args()
    if args.name is not None and args.name not in TASKS:
        parser.error(str(unknown("--name", args.name, TASKS)))
    with in_pieces(args.minutes):
        for name in [args.name] if args.name else TASKS:
            train(argparse.Namespace(**vars(args) | {"name": name}))


def train(args: argparse.Namespace) -> None:
    """Trains and publishes the recipes on one task."""
    it = plan(args, "tasks", SCALES[args.scale] | TASKS[args.name])
    found = compare(RECIPES, it.seeds, "tokens", None, it.out, it.overrides, jobs=it.jobs, controls=False)
    publish(it.out, it.results, "models", it.command)
    print(f"{args.name}:", *found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

"""How many Jacobi rounds should PonderLM-2 train with? On state tracking, at the training length and at twice that length.

    python -m experiments.tracking.rounds --scale cpu      a quarter of an hour of one core; resumable
    python -m experiments.tracking.rounds --scale cpu --minutes 8.5      call it again until it says "done"
    python -m experiments.tracking.rounds --scale cpu --smoke      a check that it runs

Every model is scored with converged rounds. The learning rate is the one that was tuned for the default in
``experiments.tracking.run``. The numbers go to ``results/tracking/rounds-cpu/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.common.publishing import Experiment, arguments, in_pieces, plan, publish, write_json, write_recipe
from experiments.tracking.run import TASK
from pondera.comparison.compare import compare
from pondera.core.run_config import load
from pondera.evaluation.perplexity import evaluate

RATE = 2e-3
LONGER = 32
"""The second length of the evaluation; training has windows of 16."""
ARMS = {
    "rounds-2-or-3": "PonderLM2(thoughts=1)",
    "rounds-growing": "PonderLM2(thoughts=1, train_rounds=((0.0, 1), (0.3, 2), (0.7, 4)))",
    "rounds-2": "PonderLM2(thoughts=1, train_rounds=(2, 2))",
    "rounds-3": "PonderLM2(thoughts=1, train_rounds=(3, 3))",
    "rounds-6": "PonderLM2(thoughts=1, train_rounds=(6, 6))",
}


def main() -> None:
    parser = arguments(__doc__, ["cpu"])
    parser.set_defaults(name="rounds")
    train(parser.parse_args())


def train(args: argparse.Namespace) -> None:
    """Trains, scores and publishes the arms."""
    it = plan(args, "tracking", {"data.task": TASK, "train.lr": RATE})
    it = dataclasses.replace(it, command=it.command.replace("experiments.tracking.run", "experiments.tracking.rounds"))
    with in_pieces(args.minutes):
        recipes = [
            write_recipe(load("plain", it.overrides | {"think": think, "name": name}), it.out / "recipes")
            for name, think in ARMS.items()
        ]
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs)
        for row in found["rows"]:
            row["longer_accuracy"] = {"context": LONGER, "values": [longer(it, Path(run)) for run in row["runs"]]}
        write_json(it.out / "results.json", found)
        publish(it.out, it.results, "rounds", it.command)
        print(*found["verdict"], sep="\n  ")


def longer(it: Experiment, run: Path) -> float:
    """The accuracy of a run in longer windows; kept in a file beside the runs, so that it is measured once."""
    kept = it.out / f"longer-{run.name}.json"
    if not kept.is_file():
        scores: dict[str, Any] = evaluate(it.out / run, {"context": LONGER})
        write_json(kept, {"accuracy": scores["accuracy"]})
    return json.loads(kept.read_text())["accuracy"]


if __name__ == "__main__":
    main()

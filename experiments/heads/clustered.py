"""What does a VQ-Logits head cost if its codes are clusters of trained output rows? That is what its paper does.

    python -m experiments.heads.clustered --scale cpu --text books.jsonl.xz      about a quarter of an hour of one core
    python -m experiments.heads.clustered --scale cpu --text books.jsonl.xz --minutes 8.5      again until it says "done"
    python -m experiments.heads.clustered --scale cpu --smoke      a check that it runs

First one plain model is trained. Then every variant continues from it for half as many steps, so all have seen the same
number of tokens in all: the plain model itself, a VQ-Logits head with clustered rows, and one with codes by the order of
token ids, which knows nothing of the trained rows. The learning rate of each is tuned with a seed that is not compared.
Results go to ``results/heads/``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.common.publishing import arguments, in_pieces, plan, publish, write_recipe
from experiments.heads.run import CODES, SCALES
from pondera.comparison.compare import compare
from pondera.comparison.plan import folder_of
from pondera.comparison.sweep import Sweep
from pondera.core.run_config import RunConfig, load

RATES = (1e-3, 2e-3)


def heads(codes: int) -> dict[str, str | None]:
    """The heads of the continued runs, by name."""
    return {
        "plain-on": None,
        "vqlogits-1-clustered": f"VQLogits(codes={codes}, init='kmeans')",
        "vqlogits-1-ordered": f"VQLogits(codes={codes}, init='order')",
    }


def arm(name: str, head: str | None, overrides: dict[str, Any], first: RunConfig, checkpoint: Path) -> RunConfig:
    """The config of a run that continues from the plain model, for half the steps of that."""
    settings = {key: value for key, value in overrides.items() if not key.startswith("backbone.")}
    settings |= {"name": name, "backbone": str(checkpoint), "train.steps": first.train.steps // 2}
    return load("plain", settings | ({"head": head} if head else {}))


def main() -> None:
    args = arguments(__doc__, list(SCALES)).parse_args()
    it = plan(args, "heads", SCALES[args.scale])
    it = dataclasses.replace(
        it,  # folders of its own: its plain model has the name of one in the tables of `run`
        out=it.out.with_name(f"clustered-{it.out.name}"),
        results=it.results.with_name(f"clustered-{it.results.name}"),
        command=it.command.replace("experiments.heads.run", "experiments.heads.clustered"),
    )
    with in_pieces(args.minutes):
        first = load("plain", it.overrides)
        compare([write_recipe(first, it.out / "recipes")], 1, "tokens", None, it.out, jobs=1)
        checkpoint = folder_of(first, it.out)
        arms = [arm(name, head, it.overrides, first, checkpoint) for name, head in heads(CODES[args.scale]).items()]
        recipes = [write_recipe(config, it.out / "recipes") for config in arms]
        sweep = None if args.smoke else Sweep("train.lr", RATES)
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs, sweep=sweep)
        publish(it.out, it.results, "clustered", it.command)
        print(*found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

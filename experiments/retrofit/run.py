"""Can a model that was trained without thinking learn it afterwards? Each method continues training from one checkpoint.

    python -m experiments.retrofit.run --scale cpu --text books.jsonl.xz      about a quarter of an hour on two cores
    python -m experiments.retrofit.run --scale gpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.retrofit.run --scale cpu --smoke      a check that it runs

First one plain model is trained. Then all variants continue from its checkpoint for the same number of tokens: the plain model
itself, which is the baseline, and each method. A method first trains only its own parameters for a quarter of the steps, if
it has parameters that can train alone, and then all parameters. At the start, every variant with one pass per token is
bit-identical to the plain model. Everything is resumable; results go to ``results/retrofit/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.plan import folder_of
from pondera.core.run_config import RunConfig, load

SCALES = {
    "cpu": {"train.steps": 200, "train.eval_tokens": 32768, "train.eval_every": 50, "train.save_every": 100},
    "gpu": GPU,
}
ARMS = {
    "plain-on": None,
    "latentcot": "AdaptiveLatentCoT(steps=1, halting='fixed')",
    "ponderlm": "PonderLM(steps=1)",
    "ponderlm3": "PonderLM3(thoughts=1, penalty=0.05, warmup=0.25)",
    "thinkathard": "ThinkAtHard(steps=1)",
}
LEARN_ALONE = ("ponderlm3", "thinkathard")


def arm(name: str, think: str | None, overrides: dict[str, Any], checkpoint: Path) -> RunConfig:
    """The config of a continued run: half the steps of the first run, and half its learning rate."""
    first = load("plain", overrides)
    steps = first.train.steps // 2
    settings: dict[str, Any] = {key: value for key, value in overrides.items() if not key.startswith("backbone.")}
    settings |= {"name": name, "backbone": str(checkpoint), "train.steps": steps, "train.lr": first.train.lr / 2}
    settings |= {"train.freeze_backbone_steps": steps // 4 if name in LEARN_ALONE else 0}
    return load("plain", settings | ({"think": think} if think else {}))


def main() -> None:
    args = arguments(__doc__, list(SCALES)).parse_args()
    it = plan(args, "retrofit", SCALES[args.scale])
    with in_pieces(args.minutes):
        plain = load("plain", it.overrides)
        compare([write_recipe(plain, it.out / "recipes")], 1, "tokens", None, it.out, jobs=1)
        arms = [arm(name, think, it.overrides, folder_of(plain, it.out)) for name, think in ARMS.items()]
        recipes = [write_recipe(config, it.out / "recipes") for config in arms]
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs, controls=False)
        publish(it.out, it.results, "tokens", it.command)
        print(*found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

"""Does it pay to choose which tokens think? Loss against the passes that tokens really take.

    python -m experiments.adaptive.run --scale cpu --text books.jsonl.xz      on two cores, in pieces if need be
    python -m experiments.adaptive.run --scale gpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.adaptive.run --scale cpu --smoke      a check that it runs

First the models that learn which tokens continue, next to models of fixed depth; then for each of them a control in which
as many tokens continue at random: its probability is solved from the mean passes that the learned model was measured to
take, over its seeds. Same data, same tokens, three seeds. Everything is resumable, and finished runs are published after
each group, to ``results/adaptive/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.core.run_config import load

CPU = {"train.steps": 200, "train.eval_tokens": 32768, "train.eval_every": 200, "train.save_every": 100}
SCALES = {"cpu": CPU, "gpu": GPU}
EXTRA = {"cpu": 2, "gpu": 3}
"""The most passes beyond the first."""


def groups(extra: int, steps: int) -> dict[str, dict[str, str | None]]:
    """Groups of arms, in the order of training: each with the spec of its think method.

    Args:
        extra: the most passes beyond the first.
        steps: of training, which AdaPonderLM's penalty is ramped up over.
    """
    ramp = f"ramp=({steps // 4}, {steps // 2})"
    return {
        "latentcot": {
            "plain": None,
            "latentcot-fixed": f"AdaptiveLatentCoT(steps={extra})",
            "latentcot-router": f"AdaptiveLatentCoT(steps={extra}, halting='router', penalty=0.1)",
        },
        "ponderlm": {
            "plain": None,
            "ponderlm": f"PonderLM(steps={extra})",
            "adaponderlm": f"AdaPonderLM(steps={extra}, penalty=1.0, bottom=0.3, {ramp})",
        },
        "relatives": {
            "plain": None,
            "universaltransformer": f"UniversalTransformer(steps={extra})",
            "thinkathard": "ThinkAtHard(steps=1)",
        },
        "ponderlm3": {"plain": None, "ponderlm3": "PonderLM3(thoughts=1, penalty=0.05, warmup=50)"},
    }


CONTROLLED = ("latentcot-router", "adaponderlm", "universaltransformer", "thinkathard", "ponderlm3")


def control(spec: str, passes: float) -> str:
    """The same method with as many passes on average, given to tokens at random.

    Example:
        >>> control("AdaptiveLatentCoT(steps=2, halting='router', penalty=0.1)", 1.75)
        "AdaptiveLatentCoT(steps=2, halting='random', continue_prob=0.5)"
    """
    head, _, rest = spec.partition("(")
    depth = rest.split(",")[0].rstrip(")")
    extra = int(depth.partition("=")[2])
    low, high = 0.0, 1.0
    for _ in range(40):  # keep + keep^2 + ... = passes - 1, which grows with keep
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(1, extra + 1)) < passes - 1 else (low, middle)
    return f"{head}({depth}, halting='random', continue_prob={round(high, 4):g})"


def recipe(name: str, think: str | None, overrides: dict[str, Any], folder: Path) -> str:
    """An arm as a recipe file; every arm shares the plain model's backbone, text and schedule."""
    given = {**overrides, "name": name} | ({"think": think} if think else {})
    return write_recipe(load("plain", given), folder)


def measured_passes(results: Path, name: str) -> float | None:
    """Mean passes of an arm over its seeds, if it has been trained."""
    if not results.is_file():
        return None
    rows = {row["name"]: row for row in json.loads(results.read_text())["rows"]}
    return rows[name]["passes_per_token"]["mean"] if name in rows else None


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.add_argument("--groups", nargs="+", choices=list(groups(2, 4)), default=list(groups(2, 4)))
    args = parser.parse_args()
    it = plan(args, "adaptive", SCALES[args.scale])

    def train(arms: dict[str, str | None], group: str) -> None:
        paths = [recipe(arm, think, it.overrides, it.out / "recipes") for arm, think in arms.items()]
        found = compare(paths, it.seeds, "tokens", None, it.out, jobs=it.jobs)
        publish(it.out, it.results, group, it.command)
        print(f"{group}:", *found["verdict"], sep="\n  ")

    with in_pieces(args.minutes):
        for group in args.groups:
            arms = groups(EXTRA[args.scale], it.overrides["train.steps"])[group]
            train(arms, group)
            for arm in filter(CONTROLLED.__contains__, list(arms)):
                passes = measured_passes(it.results / f"{group}.json", arm)
                # Where no token goes on, or every one does, chance would do the same.
                if (
                    passes is not None
                    and passes > 1
                    and not (made := control(str(arms[arm]), passes)).endswith("keep=1)")
                ):
                    arms[f"{arm}-random"] = made
            train(arms, group)


if __name__ == "__main__":
    main()

"""Does it pay to choose which tokens think? Loss against the measured passes per token.

    python -m experiments.adaptive.run --scale cpu --text books.jsonl.xz      on two cores; resumable
    python -m experiments.adaptive.run --scale gpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.adaptive.run --scale cpu --smoke      a check that it runs

Each group first trains models that learn which tokens continue, and models of fixed depth. Then each learned model gets a
control, in which tokens continue at random with the same mean passes, measured over the seeds of the learned model. All use
the same data, the same number of tokens and three seeds. Everything is resumable. After each group, finished runs are
published to ``results/adaptive/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.core.run_config import load
from pondera.methods.think.common.halting import continue_prob_for

CPU = {"train.steps": 200, "train.eval_tokens": 32768, "train.eval_every": 200, "train.save_every": 100}
SCALES = {"cpu": CPU, "gpu": GPU}
EXTRA = {"cpu": 2, "gpu": 3}
"""Maximum passes after the first."""


def groups(extra: int, steps: int) -> dict[str, dict[str, str | None]]:
    """Groups of variants in the order of training, each with the spec of its think method.

    Args:
        extra: maximum passes after the first.
        steps: training steps; AdaPonderLM increases its penalty over a part of them.
    """
    ramp = "ramp=(0.25, 0.5)"
    return {
        "latentcot": {
            "plain": None,
            "latentcot-fixed": f"AdaptiveLatentCoT(steps={extra}, halting='fixed')",
            "latentcot-router": f"AdaptiveLatentCoT(steps={extra}, halting='router', threshold=0.5, penalty=0.1)",
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
        "ponderlm3": {"plain": None, "ponderlm3": "PonderLM3(thoughts=1, penalty=0.05, warmup=0.25)"},
    }


CONTROLLED = ("latentcot-router", "adaponderlm", "universaltransformer", "thinkathard", "ponderlm3")


def control(spec: str, passes: float) -> str:
    """The same method with random halting and the same mean passes.

    Example:
        >>> control("AdaptiveLatentCoT(steps=2, halting='router', penalty=0.1)", 1.75)
        "AdaptiveLatentCoT(steps=2, halting='random', continue_prob=0.5)"
    """
    head, _, rest = spec.partition("(")
    depth = rest.split(",")[0].rstrip(")")
    extra = int(depth.partition("=")[2])
    return f"{head}({depth}, halting='random', continue_prob={round(continue_prob_for(passes, extra), 4):g})"


def recipe(name: str, think: str | None, overrides: dict[str, Any], folder: Path) -> str:
    """Writes a variant as a recipe file; all variants share backbone, text and schedule of the plain model."""
    settings = {**overrides, "name": name} | ({"think": think} if think else {})
    return write_recipe(load("plain", settings), folder)


def measured_passes(results: Path, name: str) -> float | None:
    """Mean passes of a variant over its seeds, if it has been trained."""
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
        found = compare(paths, it.seeds, "tokens", None, it.out, jobs=it.jobs, controls=False)
        publish(it.out, it.results, group, it.command)
        print(f"{group}:", *found["verdict"], sep="\n  ")

    with in_pieces(args.minutes):
        for group in args.groups:
            arms = groups(EXTRA[args.scale], it.overrides["train.steps"])[group]
            train(arms, group)
            for arm in filter(CONTROLLED.__contains__, list(arms)):
                passes = measured_passes(it.results / f"{group}.json", arm)
                # If no token or every token continues, random halting does the same.
                if (
                    passes is not None
                    and passes > 1
                    and not (random := control(str(arms[arm]), passes)).endswith("continue_prob=1)")
                ):
                    arms[f"{arm}-random"] = random
            train(arms, group)


if __name__ == "__main__":
    main()

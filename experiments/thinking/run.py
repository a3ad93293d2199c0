"""Does thinking pay at equal cost? The experiment behind the tables of the README.

    python -m experiments.thinking.run --scale cpu --text books.jsonl.xz     about an hour on two cores
    python -m experiments.thinking.run --scale gpu --text books.jsonl.xz     one GPU; call it again until it says "done"
    python -m experiments.thinking.run --scale cpu --smoke      a check that it runs

Models: plain; twice the depth (the same inference FLOPs as one thought per token); adaptive latent CoT with one step; pause
tokens (the same number of slots, constant input); PonderLM-2 with one thought. Each is trained with three seeds, first at
equal tokens, then at equal training FLOPs (those of the model of twice the depth). Everything is resumable: finished runs are
reused, interrupted runs continue from their checkpoint, and ``--minutes`` stops a call after that time. Results go to
``results/thinking/``: settings, metrics and results of every run, without weights and without local paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.demo import SETTINGS
from pondera.core.run_config import load

ARMS = ["plain", "doubledepth", "latentcot", "pausetoken", "ponderlm2"]
AT_EQUAL_FLOPS = ["doubledepth", "plain", "latentcot", "pausetoken", "ponderlm2"]
SCALES = {
    "cpu": {"train.steps": 400, "train.eval_tokens": 65536, "train.eval_every": 200, "train.save_every": 200},
    # The settings of the demo, so that both share their runs.
    "demo": SETTINGS,
    "gpu": GPU,
}
EQUAL = ["tokens", "flops"]


def write_recipes(overrides: dict[str, Any], folder: Path) -> dict[str, str]:
    """Writes the variants at this scale as YAML files; ``doubledepth`` has twice the depth of the others."""
    paths = {}
    for arm in ARMS:
        config = load(arm, overrides)
        if arm == "doubledepth":
            config.backbone["num_hidden_layers"] = 2 * load("plain", overrides).backbone["num_hidden_layers"]
        paths[arm] = write_recipe(config, folder)
    return paths


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.add_argument("--equal", nargs="+", choices=EQUAL, default=EQUAL)
    args = parser.parse_args()
    further = ("--equal", *args.equal) if args.equal != EQUAL else ()
    it = plan(args, "thinking", SCALES[args.scale], further)
    paths = write_recipes(it.overrides, it.out / "recipes")
    recipes = {"tokens": ARMS, "flops": AT_EQUAL_FLOPS}
    with in_pieces(args.minutes):
        for equal in args.equal:
            found = compare([paths[arm] for arm in recipes[equal]], it.seeds, equal, None, it.out, jobs=it.jobs)
            publish(it.out, it.results, equal, it.command)
            print(f"equal {equal}:", *found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

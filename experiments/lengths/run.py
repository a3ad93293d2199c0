"""What is left of the accuracy beyond the training length? State tracking in S3, in windows of 16, 32 and 64 tokens.

    python -m experiments.lengths.run --scale cpu      on two cores; resumable
    python -m experiments.lengths.run --scale cpu --minutes 8.5      call it again until it says "done"
    python -m experiments.lengths.run --scale cpu --smoke      a check that it runs

Four models of ``experiments/tracking`` are trained on windows of 16 tokens, at the learning rate of the recipes, and scored on
held-out windows of each length, as by ``pondera eval RUN --lengths 16,32,64``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.publishing import arguments, in_pieces, plan, publish, write_json, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.rows import spread
from pondera.core.run_config import load
from pondera.evaluation.lengths import evaluate_lengths

SCALES: dict[str, dict[str, Any]] = {"cpu": {"train.steps": 400, "train.eval_every": 400, "train.save_every": 400}}
TASK = {"data.task": "StateTracking(group='S3', reset=0.25)"}
LENGTHS, TOKENS = (16, 32, 64), 16384
"""The lengths, and the tokens of each length that a model is scored on."""
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "doubledepth": {"backbone.num_hidden_layers": 2},
    "latentcot-3": {"think": "AdaptiveLatentCoT(steps=3, halting='fixed')"},
    "ponderlm2": {"think": "PonderLM2(thoughts=1)"},
}
"""Settings of each model beside those of the recipe plain on a task."""
MEASURES = ("accuracy", "accuracy_beyond", "passes_per_token")


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.set_defaults(name="s3-resets")
    args = parser.parse_args()
    it = plan(args, "lengths", SCALES[args.scale] | TASK)
    with in_pieces(args.minutes):
        paths = [
            write_recipe(load("plain", it.overrides | settings | {"name": name}), it.out / "recipes")
            for name, settings in MODELS.items()
        ]
        found = compare(paths, it.seeds, "tokens", None, it.out, jobs=it.jobs, controls=False)
        publish(it.out, it.results, "trained", it.command)
        rows = [row for one in found["rows"] for row in scored(one["name"], [it.out / run for run in one["runs"]])]
        trained = found["rows"][0]["seeds"]
        write_json(
            it.results / "lengths.json", {"command": it.command, "seeds": len(trained), "tokens": TOKENS, "rows": rows}
        )


def scored(name: str, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each length: the measures of the runs of one model, and their accuracy by difficulty."""
    found = [evaluate_lengths(run, LENGTHS, TOKENS)["lengths"] for run in runs]
    return [
        {
            "name": name,
            "length": at[0]["length"],
            **{measure: spread([one[measure] for one in at]) for measure in MEASURES},
            "by_difficulty": [one["by_difficulty"] for one in at],
        }
        for at in zip(*found, strict=True)
    ]


if __name__ == "__main__":
    main()

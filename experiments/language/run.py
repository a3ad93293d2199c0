"""Does thinking pay on text, if models are trained well enough to tell?

    python -m experiments.language.run --scale cpu --text books.jsonl.xz      on two cores; resumable
    python -m experiments.language.run --scale cpu --text books.jsonl.xz --arms plain doubledepth latentcot
    python -m experiments.language.run --scale cpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.language.run --scale gpu --text books.jsonl.xz --minutes 8.5
    python -m experiments.language.run --scale cpu --text books.jsonl.xz --pairs blimp.jsonl.xz --last-word lambada.jsonl.xz
    python -m experiments.language.run --scale cpu --smoke      a check that it runs

At least 20 tokens per parameter, windows spread over the whole held-out text, and a learning rate that is tuned for each
model with a seed that is not compared. Results are published to ``results/language/`` after each call. With `--pairs` or
`--last-word` the trained runs are also scored on minimal pairs or last words, which changes no run; these results are in
``tasks.json``.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, Experiment, arguments, in_pieces, plan, publish, write_json, write_recipe
from experiments.language.tasks import evaluate_tasks
from pondera.comparison.compare import compare
from pondera.comparison.sweep import Sweep
from pondera.core.run_config import load

CPU = {
    "backbone.hidden_size": 64,
    "backbone.intermediate_size": 176,
    "backbone.num_hidden_layers": 2,
    "data.tokenizer": "bpe-1024",
    "data.context": 128,
    "train.steps": 2300,
    "train.batch_size": 16,
    "train.eval_tokens": 131072,
    "train.eval_every": 2300,
    "train.save_every": 500,
}
"""0.23 M parameters of a plain model, 4.7 M tokens."""
SCALES: dict[str, dict[str, Any]] = {"cpu": CPU, "gpu": GPU}
LAYERS = {"cpu": 2, "gpu": 8}
RATES = {"cpu": (4e-3, 8e-3), "gpu": (1e-3, 2e-3)}


def arms(layers: int) -> dict[str, dict[str, Any]]:
    """The settings of each variant beside those of the scale.

    Args:
        layers: the layers of the plain model.
    """
    double = {"backbone.num_hidden_layers": 2 * layers}
    return {
        "plain": {},
        "doubledepth": double,
        "doubledepth-stock": {**double, "init": "hf", "train.weight_decay": 0.01},
        "latentcot": {"think": "AdaptiveLatentCoT(steps=1, halting='fixed')"},
        "ponderlm2": {"think": "PonderLM2(thoughts=1)"},
        "adaptivelatentcot": {"think": "AdaptiveLatentCoT(steps=3)"},
        "conceptlm": {"chunk": "ConceptLM()", "train.lr_scale": 0.1},
    }


def main() -> None:
    parser = arguments(__doc__, list(SCALES))
    parser.add_argument("--arms", nargs="+", choices=list(arms(1)), default=list(arms(1)))
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="after training, minimal pairs such as BLiMP")
    parser.add_argument("--last-word", type=Path, metavar="FILE", help="after training, texts such as LAMBADA")
    parser.add_argument("--max-rows", type=int, metavar="N", help="rows of each file, spread evenly (default: all)")
    args = parser.parse_args()
    further = () if args.arms == list(arms(1)) else ("--arms", *args.arms)
    it = plan(args, "language", SCALES[args.scale], further)
    with in_pieces(args.minutes):
        chosen = {name: settings for name, settings in arms(LAYERS[args.scale]).items() if name in args.arms}
        paths = [
            write_recipe(load("plain", it.overrides | settings | {"name": name}), it.out / "recipes")
            for name, settings in chosen.items()
        ]
        sweep = None if args.smoke else Sweep("train.lr", RATES[args.scale])
        found = compare(paths, it.seeds, "tokens", None, it.out, jobs=it.jobs, sweep=sweep)
        publish(it.out, it.results, "tokens", it.command)
        publish_tasks(args, it, found["rows"])
        print(*found["verdict"], sep="\n")


def publish_tasks(args: argparse.Namespace, it: Experiment, rows: list[dict[str, Any]]) -> None:
    """Scores the runs on the files that were given, and writes ``tasks.json`` to the results."""
    given = {name: getattr(args, name) for name in ("pairs", "last_word")}
    files = {name: file for name, file in given.items() if file is not None}
    if not files:
        return
    words = [word for name, file in files.items() for word in ("--" + name.replace("_", "-"), file.name)]
    words += [] if args.max_rows is None else ["--max-rows", str(args.max_rows)]
    found = evaluate_tasks(rows, it.out, files, args.max_rows)
    write_json(it.results / "tasks.json", found | {"command": f"{it.command} {shlex.join(words)}"})


if __name__ == "__main__":
    main()

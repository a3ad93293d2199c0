"""What does a VQ-Logits head cost in quality? Compared with the full output matrix: same backbone, data and tokens.

    python -m experiments.heads.run --scale cpu --text books.jsonl.xz      about a quarter of an hour on two cores
    python -m experiments.heads.run --scale gpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.heads.run --scale cpu --smoke      a check that it runs

Models: the full matrix; a quarter as many codes as tokens, with one, two or four codes per token; one code without the bias
per token. Results go to ``results/heads/``. ``benchmarks/heads.py`` measures the time of the heads.
"""

from __future__ import annotations

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_recipe
from pondera.comparison.compare import compare
from pondera.core.run_config import load

SCALES = {
    "cpu": {"train.steps": 200, "train.eval_tokens": 32768, "train.eval_every": 200, "train.save_every": 100},
    "gpu": GPU,
}
CODES = {"cpu": 512, "gpu": 2048}


def main() -> None:
    args = arguments(__doc__, list(SCALES)).parse_args()
    it, codes = plan(args, "heads", SCALES[args.scale]), CODES[args.scale]
    heads = {"plain": None} | {f"vqlogits-{n}": f"VQLogits(codes={codes}, groups={n})" for n in (1, 2, 4)}
    heads["vqlogits-1-no-bias"] = f"VQLogits(codes={codes}, bias=False)"
    with in_pieces(args.minutes):
        arms = [
            load("plain", {**it.overrides, "name": name} | ({"head": head} if head else {}))
            for name, head in heads.items()
        ]
        recipes = [write_recipe(config, it.out / "recipes") for config in arms]
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs)
        publish(it.out, it.results, "tokens", it.command)
        print(*found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

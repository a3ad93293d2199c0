"""Does predicting concepts improve a language model? ConceptLM and plain models of equal size and of equal cost.

    python -m experiments.concepts.run --scale cpu --text books.jsonl.xz      about half an hour on two cores
    python -m experiments.concepts.run --scale gpu --text books.jsonl.xz --minutes 8.5      call it again until it says "done"
    python -m experiments.concepts.run --scale cpu --smoke      a check that it runs

Models: plain; plain with wider layers and the training FLOPs of ConceptLM; plain with still wider layers and the parameters of
ConceptLM; ConceptLM; ConceptLM without its concept loss (an additional layer at a quarter of the rate remains), with a softmax
merge, and with only the most likely code. All use the same data, the same number of tokens and three seeds. The trained
ConceptLM is also scored with its concepts set to zero. Everything is resumable; results go to ``results/concepts/``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common.publishing import GPU, arguments, in_pieces, plan, publish, write_json, write_recipe
from pondera.comparison.compare import compare
from pondera.comparison.equal_cost import flops_per_step
from pondera.comparison.plan import folder_of, with_seed
from pondera.comparison.rows import spread
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.score import score
from pondera.inference.load import load as load_model
from pondera.training.build import new_model

CPU = {"train.steps": 300, "train.eval_tokens": 32768, "train.eval_every": 300, "train.save_every": 100}
SCALES = {"cpu": CPU | {"backbone.num_hidden_layers": 4}, "gpu": GPU}
FORMS = {
    "conceptlm": "",
    "conceptlm-no-loss": ", ncp_weight=0.0",
    "conceptlm-softmax": ", merge='softmax'",
    "conceptlm-hard": ", merge='hard'",
}


def concept_model(name: str, further: str, overrides: dict[str, Any]) -> RunConfig:
    """A variant of ConceptLM; half of the layers encode."""
    return load("plain", {**overrides, "name": name, "chunk": f"ConceptLM(chunk=4, codes=64, segments=8{further})"})


def widened(name: str, wanted: float, measure: Callable[[RunConfig], float], overrides: dict[str, Any]) -> RunConfig:
    """The plain model with feed-forward layers wide enough to reach `wanted`; the width is a multiple of 8."""

    def with_width(width: int) -> RunConfig:
        return load("plain", {**overrides, "name": name, "backbone.intermediate_size": width})

    low, high = 8, 16 * load("plain", overrides).backbone["hidden_size"]
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if measure(with_width(middle)) < wanted else (low, middle)
    return with_width(high)


def parameters(config: RunConfig) -> float:
    """The number of parameters of a model."""
    return float(sum(p.numel() for p in new_model(config, prepare(config.data).vocab_size).parameters()))


def zeroed(config: RunConfig, out: Path, seeds: int) -> dict[str, Any]:
    """Scores the trained ConceptLM with its concepts and without them, on the windows of the comparison."""
    bits: dict[str, list[float | None]] = {"with": [], "without": []}
    for seed in range(config.train.seed, config.train.seed + seeds):
        run = Run.open(folder_of(with_seed(config, seed), out))
        model, held_out = load_model(str(run.path)).model, prepare(config.data).validation
        for name, effort in (("with", 1.0), ("without", 0.0)):
            budget, tokens = {"effort": effort}, config.train.eval_tokens
            scores = score(model, held_out, config.data.context, tokens, config.train.batch_size, budget=budget)
            bits[name].append(scores["bits_per_byte"])
    return {name: spread(values) for name, values in bits.items()}


def main() -> None:
    args = arguments(__doc__, list(SCALES)).parse_args()
    it = plan(args, "concepts", SCALES[args.scale])
    with in_pieces(args.minutes):
        concepts = [concept_model(name, further, it.overrides) for name, further in FORMS.items()]
        plain = load("plain", it.overrides)
        wider = widened("plain-equal-flops", flops_per_step(concepts[0]), flops_per_step, it.overrides)
        larger = widened("plain-equal-size", parameters(concepts[0]), parameters, it.overrides)
        recipes = [write_recipe(config, it.out / "recipes") for config in (plain, wider, larger, *concepts)]
        found = compare(recipes, it.seeds, "tokens", None, it.out, jobs=it.jobs)
        publish(it.out, it.results, "tokens", it.command)
        rows = zeroed(concepts[0], it.out, it.seeds)
        write_json(it.results / "zeroed.json", {"command": it.command, "rows": rows})
        print(*found["verdict"], sep="\n  ")


if __name__ == "__main__":
    main()

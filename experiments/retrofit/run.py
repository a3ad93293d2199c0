"""Does a thinking method pay on a pretrained model that LoRA retrofits, or is the compute better spent on LoRA alone?

    python -m experiments.retrofit.run --scale cpu --seeds 1      on one core; resumable
    python -m experiments.retrofit.run --scale cpu --seeds 1 --minutes 8.5      call it again until it says "done"
    python -m experiments.retrofit.run --scale cpu      three seeds; the runs of one seed are kept
    python -m experiments.retrofit.run --scale cpu --smoke      a check that it runs

SmolLM2-135M is trained with LoRA of rank 8 on the sources of Python's standard library, with held-out files. All arms but one
spend the same training FLOPs: LoRA alone, one latent thought (PonderLM-2), and one latent step with a router (adaptive latent
CoT; its steps are counted as if every token took it, so it spends less once the router halts tokens). The last arm is LoRA
alone on as much text as the thought gets, which takes a seventh of the compute. The learning rate of each method is chosen at a
quarter of the budget, with a seed that is not compared. ``setup.json`` has the scores of the rates, and that of the model
without training. An arm that is still far above the untrained model has not converged, and its score says nothing about the
method.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from experiments.common.publishing import (
    SMOKE,
    Experiment,
    arguments,
    in_pieces,
    plan,
    publish,
    write_json,
    write_recipe,
)
from pondera.comparison.compare import compare
from pondera.comparison.equal_cost import at_equal_flops
from pondera.comparison.sweep import Sweep, tune
from pondera.core.run_config import RunConfig, load
from pondera.core.run_folder import Run, is_run
from pondera.training.build import new_model, resolve

CPU = {
    "backbone": "smollm2",
    "data.context": 128,
    "data.max_bytes": 3_000_000,
    "train.lora": 8,
    "train.batch_size": 1,
    "train.warmup": 0.1,
    "train.eval_tokens": 4096,
    "train.eval_every": 10_000,
    "train.save_every": 25,
    "train.keep": 1,
}
SCALES: dict[str, dict[str, Any]] = {"cpu": CPU}
FLOPS = 4e13
"""Training FLOPs of a run: about seven minutes on one core, 535 steps of LoRA alone."""
RATES = (3e-4, 1e-3, 3e-3)
TUNED_AT = 0.25
"""The share of the budget at which rates are compared."""
ARMS = {
    "lora": None,
    "ponderlm2": "PonderLM2(thoughts=1)",
    "adaptivelatentcot": "AdaptiveLatentCoT(steps=1)",
}


def main() -> None:
    args = arguments(__doc__, list(SCALES)).parse_args()
    with in_pieces(args.minutes):
        it = plan(args, "retrofit", SCALES[args.scale])
        if args.smoke:
            it = _smoke(it)
        _run(it, smoke=args.smoke)


def _run(it: Experiment, smoke: bool) -> None:
    configs = [load("plain", it.overrides | {"name": name, "think": think}) for name, think in ARMS.items()]
    budget = 4e9 if smoke else FLOPS
    equal = at_equal_flops([resolve(config) for config in configs], budget)
    sweep, records = Sweep("train.lr", RATES[:2] if smoke else RATES), {}
    tuned = []
    for config in equal:
        small = _settings(config, steps=max(1, round(TUNED_AT * config.train.steps)), eval_tokens=1024)
        chosen, records[config.name] = tune([small], sweep, it.seeds, it.out, True, 1)
        _drop_weights(it.out)
        tuned.append(sweep.applied(config, chosen[config.name]))
    setup = {"flops": budget, "tuned_at": TUNED_AT, "rates": records, "untrained": _untrained(tuned[0])}
    write_json(it.results / "setup.json", setup)
    short = dataclasses.replace(_settings(tuned[0], steps=tuned[1].train.steps), name="lora-as-much-text")
    recipes = [write_recipe(config, it.out / "recipes") for config in (*tuned, short)]
    found = compare(recipes, it.seeds, "tokens", None, it.out, {}, jobs=1, controls=False)
    publish(it.out, it.results, "arms", it.command)
    _drop_weights(it.out)
    print(f"untrained: {setup['untrained']}", *found["verdict"], sep="\n  ")


def _settings(config: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def _untrained(config: RunConfig) -> dict[str, float]:
    """The scores of the backbone before any training, on the same held-out windows."""
    from pondera.data.corpus import prepare
    from pondera.evaluation.score import score

    corpus = prepare(config.data)
    model = new_model(_settings(config, lora=0), corpus.vocab_size).eval()
    found = score(model, corpus.validation, config.data.context, config.train.eval_tokens)
    return {name: found[name] for name in ("loss", "bits_per_byte")}


def _drop_weights(out: Path) -> None:
    """Deletes the weights of finished runs, a gigabyte each; their records stay."""
    for run in [Run(folder) for kind in ("tuning", "runs") for folder in (out / kind).glob("*") if is_run(folder)]:
        if run.result() is not None:
            shutil.rmtree(run.checkpoints_dir, ignore_errors=True)
            shutil.rmtree(run.model_dir, ignore_errors=True)


def _smoke(it: Experiment) -> Experiment:
    """The experiment on a tiny backbone, which is trained first."""
    from pondera.training.train import train

    folder = it.out / "backbone"
    tiny = SMOKE | {"data.text": it.overrides["data.text"], "data.context": 128}
    if not is_run(folder):
        train(load("plain", tiny), folder)
    own = {name: value for name, value in it.overrides.items() if not name.startswith("backbone.")}
    return dataclasses.replace(it, overrides=own | {"backbone": str(folder), "train.eval_every": 10_000})


if __name__ == "__main__":
    main()

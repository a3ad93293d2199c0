"""Equal training FLOPs: the number of steps that each variant gets."""

from __future__ import annotations

import dataclasses

from pondera.core.errors import UserError
from pondera.core.run_config import RunConfig
from pondera.evaluation.cost_report import cost_report
from pondera.training.build import new_model


def at_equal_flops(configs: list[RunConfig], budget: float | None) -> list[RunConfig]:
    """Sets `train.steps` so that each config spends `budget` training FLOPs (default: those of the first config)."""
    per_step = [flops_per_step(config) for config in configs]
    budget = budget if budget is not None else per_step[0] * configs[0].train.steps
    equal = []
    for config, cost in zip(configs, per_step, strict=True):
        steps = round(budget / cost)
        if steps < 1:
            raise UserError(f"--flops {budget:.3g}: one step of {config.name} costs {cost:.3g}; give a larger budget")
        equal.append(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
    return equal


def flops_per_step(config: RunConfig) -> float:
    """Analytic training FLOPs of one optimizer step."""
    from pondera.data.corpus import prepare

    model = new_model(config, prepare(config.data).vocab_size)
    train, context = config.train, config.data.context
    report = cost_report(model, context, train.gradient_checkpointing, lora=train.lora)
    return report["training_flops_per_token"] * context * train.batch_size

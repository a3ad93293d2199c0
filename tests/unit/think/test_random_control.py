"""The random control of a learned rule takes the passes that it is asked to take, and no other method has one."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core import spec
from pondera.methods.think.common.halting import continue_prob_for


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_the_probability_gives_the_passes(steps, share):
    passes = 1 + share * steps
    chosen = continue_prob_for(passes, steps)
    assert sum(chosen**step for step in range(steps + 1)) == pytest.approx(passes, abs=1e-9)


def test_passes_that_cannot_be_reached():
    assert continue_prob_for(0.5, 2) == pytest.approx(0, abs=1e-9)
    assert continue_prob_for(3.5, 2) == pytest.approx(1, abs=1e-9)


RULES = [
    "AdaptiveLatentCoT(2, penalty=0.3)",
    "UniversalTransformer(2, epsilon=0.2)",
    "AdaPonderLM(2, top_k=None)",
    "PonderLM3(2, eval_rounds='exact')",
    "ThinkAtHard(2)",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("passes", [1.0, 1.37, 2.2, 3.0])
def test_random_tokens_take_these_passes(passes, rule):
    learned = spec.build(rule, "think")
    control = learned.random_control(passes)
    rebuilt = spec.build(repr(control), "think")
    assert rebuilt.halting.kind == "random" and rebuilt.slots_per_token == 3 and repr(rebuilt) == repr(control)
    torch.manual_seed(0)
    config = AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think=repr(control), init="scaled")
    with torch.no_grad():
        taken = AdaptiveLM(config).eval()(ids(64, 32)).passes.double()
    assert float(taken.mean()) == pytest.approx(passes, abs=0.05)
    assert passes in (1.0, 3.0) or len(taken.unique()) == 3


@pytest.mark.parametrize(
    "think",
    [
        "AdaptiveLatentCoT(steps=2, halting='fixed')",
        "AdaPonderLM(steps=2, halted='dense')",
        "UniversalTransformer(steps=0)",
        "AdaptiveLatentCoT(steps=2, halting='random')",
        "AdaptiveLatentCoT(steps=2, halting='oracle')",
        "AdaptiveLatentCoT(steps=0, halting='router')",
        "PauseToken()",
        "PonderLM2()",
    ],
)
def test_what_learns_no_rule_has_no_control(think):
    assert spec.build(think, "think").random_control(1.5) is None

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


@pytest.mark.parametrize("passes", [1.0, 1.37, 2.2, 3.0])
def test_random_tokens_take_these_passes(passes):
    learned = spec.build("AdaptiveLatentCoT(steps=2, halting='router', penalty=0.3)", "think")
    control = learned.random_control(passes)
    rebuilt = spec.build(repr(control), "think")
    assert rebuilt.halting.kind == "random" and rebuilt.steps == 2 and repr(rebuilt) == repr(control)
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
        "AdaptiveLatentCoT(steps=2, halting='random')",
        "AdaptiveLatentCoT(steps=2, halting='oracle')",
        "AdaptiveLatentCoT(steps=0, halting='router')",
        "PauseToken()",
        "PonderLM2()",
    ],
)
def test_what_learns_no_rule_has_no_control(think):
    assert spec.build(think, "think").random_control(1.5) is None

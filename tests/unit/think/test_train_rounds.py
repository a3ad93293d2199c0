"""Jacobi rounds in training: drawn from a range, or growing with the training, and priced as they are."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core import spec
from pondera.core.errors import UserError
from pondera.methods.think.common.train_rounds import mean_rounds

GROWING = "((0.0, 1), (0.3, 2), (0.7, 4))"
METHODS = ["PonderLM2(thoughts=1, train_rounds={})", "PonderLM3(thoughts=1, train_rounds={})"]


def calls(model: AdaptiveLM) -> int:
    """The passes of the backbone in one training call."""
    seen = []
    hook = model.backbone.decoder.register_forward_pre_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids(2, 6))
    hook.remove()
    return len(seen)


@pytest.mark.parametrize("method", METHODS)
def test_rounds_grow_with_the_training(method):
    config = AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think=method.format(GROWING), init="scaled")
    model, seen = AdaptiveLM(config).train(), []
    for progress in (0.0, 0.29, 0.3, 0.69, 0.7, 0.999, 1.0):
        model.begin_step(5, seed=3, progress=progress)
        seen.append(calls(model))
    # A guess of one pass, the rounds, and the last pass.
    assert seen == [2 + rounds for rounds in (1, 1, 2, 2, 4, 4, 4)]


def test_a_schedule_is_priced_at_its_mean():
    growing, lists, mean = (
        spec.build(METHODS[0].format(rounds), "think") for rounds in (GROWING, "[[0, 1], [0.3, 2], [0.7, 4]]", "(2, 3)")
    )
    assert mean_rounds(growing.train_rounds) == pytest.approx(0.3 * 1 + 0.4 * 2 + 0.3 * 4)
    assert growing.train_rounds == lists.train_rounds
    assert growing.cost_schedule(8, training=True)[-1].repeats == pytest.approx(3.3)
    assert mean.cost_schedule(8, training=True)[-1].repeats == pytest.approx(3.5)
    rebuilt = spec.build(repr(growing), "think")
    assert rebuilt.train_rounds == growing.train_rounds and repr(rebuilt) == repr(growing)


def test_one_number_throughout():
    think = spec.build("PonderLM2(train_rounds=((0, 6),))", "think")
    think.begin_step(0, 0, 0.0)
    assert think._rounds_now == 6 and mean_rounds(think.train_rounds) == 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "rounds",
    [
        "()",
        "(3, 2)",
        "(-1, 2)",
        "(1, 2, 3)",
        "(1.5, 2)",
        "(True, 2)",
        "((0.3, 1), (0.7, 2))",
        "((0, 1), (0.7, 2), (0.3, 4))",
        "((0, 1), (1, 2))",
        "((0, 1), 2)",
        "((0, 1), (0.5, 1.5))",
        "((0, 1), (0.5, -1))",
        "((0, 1), ('half', 2))",
    ],
)
def test_other_forms_say_what_to_type(method, rounds):
    with pytest.raises(UserError, match=r"train_rounds=.*\(2, 3\).*\(\(0, 1\), \(0.3, 2\), \(0.7, 4\)\)"):
        spec.build(method.format(rounds), "think")

"""The control in which random tokens get the passes of a window, and the one in which the difficulty sets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.run_config import DataConfig, load
from pondera.data.corpus import prepare
from pondera.evaluation.permuted_passes import can_permute, permuted, run_windows
from pondera.evaluation.score import score
from pondera.training.train import train

TASK = "StateTracking('S3', reset=0.25)"
BACKBONE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
ROUTER = "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.5)"


def model_of(think: str | None) -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=BACKBONE, think=think, init="scaled")).eval()
    if think == ROUTER:
        torch.nn.init.normal_(model.think.router.weight, std=2.0)
        torch.nn.init.zeros_(model.think.router.bias)
    return model


def test_rows_are_reordered_by_their_own_number():
    passes = torch.arange(40).view(2, 20)
    one, two = permuted(passes, [3, 4]), permuted(passes.flip(0), [4, 3]).flip(0)
    assert torch.equal(one, two)
    assert torch.equal(one.sort(-1).values, passes)
    assert not torch.equal(one, passes)
    assert not torch.equal(one[0] % 20, one[1] % 20)


@torch.no_grad()
def test_the_same_passes_on_other_tokens(tmp_path: Path):
    corpus, model = prepare(DataConfig(task=TASK, context=16), tmp_path), model_of(ROUTER)
    windows = [corpus.validation.windows(16)[index] for index in range(8)]
    given = {"input_ids": torch.stack([window["input_ids"] for window in windows])}
    own, other = (run_windows(model, given, windows, permute).passes for permute in (False, True))
    assert own.unique().numel() > 1
    assert torch.equal(own.sort(-1).values, other.sort(-1).values)
    assert not torch.equal(own, other)


def test_the_score_does_not_depend_on_the_batch(tmp_path: Path):
    corpus, model = prepare(DataConfig(task=TASK, context=16), tmp_path), model_of(ROUTER)
    own, *others = (
        score(model, corpus.validation, 16, 16 * 24, batch_size=size, permute=permute)
        for size, permute in ((8, False), (8, True), (5, True))
    )
    assert others[0]["loss"] == pytest.approx(others[1]["loss"], abs=1e-6)
    assert others[0]["passes_per_token"] == own["passes_per_token"]
    assert others[0]["loss"] != pytest.approx(own["loss"], abs=1e-4)


@pytest.mark.parametrize("think", [None, "PonderLM2(thoughts=1)", "AdaptiveLatentCoT(steps=2, halting='fixed')"])
def test_models_without_decisions_have_none_to_permute(think: str | None):
    assert not can_permute(model_of(think))


TINY = {
    "backbone": {name: size for name, size in BACKBONE.items() if name != "vocab_size"},
    "data.task": TASK,
    "data.windows": 600,
    "train.steps": 2,
    "train.batch_size": 4,
    "train.eval_tokens": 160,
}


def test_a_run_with_a_router_has_the_permuted_score(tmp_path: Path):
    config = load("plain", {**TINY, "think": ROUTER})
    result = train(config, tmp_path / "run", progress=False).result()
    assert 0 <= result["permuted_error"] <= 1
    assert result["permuted_accuracy"] == pytest.approx(1 - result["permuted_error"])


def test_known_difficulty_sets_the_passes(tmp_path: Path):
    think = "AdaptiveLatentCoT(steps=2, halting='fixed')"
    config = load("plain", {**TINY, "think": think, "data.known_difficulty": True})
    result = train(config, tmp_path / "run", progress=False).result()
    found = result["by_difficulty"]
    expected = [min(3, 1 + level) for level in found["difficulty"]]
    assert found["passes"] == pytest.approx(expected)
    assert result["passes_per_token"] < 3


def test_a_method_with_equal_passes_refuses_the_difficulty(tmp_path: Path):
    config = load("plain", {**TINY, "think": "PonderLM2(thoughts=1)", "data.known_difficulty": True})
    with pytest.raises(UserError, match="the same number of passes for every token"):
        train(config, tmp_path / "run", progress=False)


def test_a_text_has_no_difficulty():
    with pytest.raises(UserError, match="data.known_difficulty: a text has none"):
        prepare(DataConfig(known_difficulty=True))

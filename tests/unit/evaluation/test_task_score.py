"""Scores on a task: sums by difficulty against a loop over tokens; runs on a task train, are scored and are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.metric import score_name
from pondera.core.run_config import DataConfig, load
from pondera.data.corpus import prepare
from pondera.evaluation.score import score, spread_evenly
from pondera.evaluation.task_score import TaskSums

TINY = {
    "backbone.hidden_size": 16,
    "backbone.intermediate_size": 32,
    "backbone.num_hidden_layers": 1,
    "backbone.num_attention_heads": 2,
    "backbone.num_key_value_heads": 2,
    "data.task": "StateTracking('S3', reset=0.25)",
    "data.context": 12,
    "data.windows": 600,
    "train.steps": 3,
    "train.batch_size": 4,
    "train.eval_tokens": 240,
    "train.log_every": 1,
}


def model_of(vocab: int, think: str | None = None) -> AdaptiveLM:
    torch.manual_seed(0)
    backbone = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": vocab,
    }
    return AdaptiveLM(AdaptiveConfig(backbone=backbone, think=think, init="scaled")).eval()


@pytest.mark.parametrize("think", [None, "AdaptiveLatentCoT(steps=2, halting='random')"])
def test_scores_are_those_of_a_loop_over_tokens(think: str | None, tmp_path: Path):
    corpus = prepare(DataConfig(task="PointerChasing(nodes=4, hops=3)", context=17), tmp_path)
    model, windows = model_of(corpus.vocab_size, think), corpus.validation.windows(17)
    found = score(model, corpus.validation, 17, 17 * 20, batch_size=7)
    right: dict[int, list[bool]] = {}
    passes: dict[int, list[int]] = {}
    nats = []
    for index in spread_evenly(20, len(windows)):
        window = windows[index]
        with torch.no_grad():
            out = model(window["input_ids"][None])
        for place, (target, level) in enumerate(
            zip(window["targets"].tolist(), window["difficulty"].tolist(), strict=True)
        ):
            if target >= 0:
                right.setdefault(level, []).append(int(out.logits[0, place].argmax()) == target)
                passes.setdefault(level, []).append(int(out.passes[0, place]))
                nats.append(-float(out.logits[0, place].log_softmax(-1)[target]))
    every = [one for level in right for one in right[level]]
    assert found["scored_tokens"] == len(every) and found["accuracy"] == pytest.approx(sum(every) / len(every))
    assert found["error"] == pytest.approx(1 - found["accuracy"]) and found["loss"] == pytest.approx(
        sum(nats) / len(nats), rel=1e-4
    )
    table = found["by_difficulty"]
    assert table["difficulty"] == sorted(right) == [1, 2, 3]
    for level, accuracy, mean in zip(table["difficulty"], table["accuracy"], table["passes"], strict=True):
        assert accuracy == pytest.approx(sum(right[level]) / len(right[level]))
        assert mean == pytest.approx(sum(passes[level]) / len(passes[level]))
    flat = torch.tensor([[level, number] for level in passes for number in passes[level]]).double().T
    if think is None:
        assert found["passes_correlation"] is None and found["passes_per_token"] == 1
    else:
        assert found["passes_correlation"] == pytest.approx(float(torch.corrcoef(flat)[0, 1]), abs=1e-6)


def test_a_perfect_and_a_wrong_answer_are_told_apart():
    level = torch.tensor([0, 1, 1, 3])
    sums = TaskSums.of(level, torch.tensor([True, True, False, False]), torch.ones(4), torch.tensor([1, 2, 2, 4]))
    found = sums.scores()
    assert found["accuracy"] == 0.5 and found["by_difficulty"]["accuracy"] == [1.0, 0.5, 0.0]
    assert found["passes_correlation"] == pytest.approx(1.0)


def test_windows_are_spread_over_the_split():
    assert spread_evenly(4, 100) == [0, 25, 50, 75] and spread_evenly(7, 3) == [0, 1, 2]


def test_the_first_common_score_is_used():
    assert score_name([{"bits_per_byte": 1.0, "loss": 2.0}, {"loss": 1.0}]) == "loss"
    assert score_name([{"error": 0.0, "loss": 2.0}]) == "error"


def test_a_run_on_a_task_trains_resumes_and_is_scored(tmp_path: Path, monkeypatch):
    from pondera.comparison.compare import compare
    from pondera.evaluation.perplexity import evaluate
    from pondera.evaluation.windows import held_out
    from pondera.inference.load import load as load_run
    from pondera.report.page import write_report

    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path / "cache"))
    found = compare(["plain", "adaptivelatentcot"], seeds=2, out=tmp_path / "out", overrides=TINY, progress=False)
    assert found["score"] == "error" and "error rate" in found["verdict"][0]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["plain"]["accuracy"]["mean"] == pytest.approx(1 - rows["plain"]["error"]["mean"])
    assert len(rows["adaptivelatentcot"]["by_difficulty"]) == 2
    run = next((tmp_path / "out/runs").glob("plain-*"))
    result = json.loads((run / "result.json").read_text())
    again = evaluate(run, max_tokens=240)
    assert again["accuracy"] == pytest.approx(result["accuracy"]) and again["loss"] == pytest.approx(
        result["loss"], rel=1e-5
    )
    longer = evaluate(run, {"context": 24}, max_tokens=240)
    assert longer["context"] == 24 and max(longer["by_difficulty"]["difficulty"]) > 12
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "error rate" in page and "bits/byte" not in page
    with pytest.raises(UserError, match="trained on the task"):
        held_out(load_run(run), {}, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.windows": 0}, "at least 1"),
        ({"data.document_mask": True}, "one document"),
        ({"data.task": "StateTracking(grup='S3')"}, "group"),
        ({"data.task": "PonderLM2()"}, "StateTracking|task"),
    ],
)
def test_wrong_settings_of_a_task_are_refused(change: dict, said: str, tmp_path: Path):
    config = load("plain", {**TINY, **change})
    with pytest.raises(UserError, match=said):
        prepare(config.data, tmp_path)

"""Training with tokens that take different numbers of passes: charged for what ran, and resumed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import training_worker

from pondera.core.run_folder import Run
from pondera.evaluation.cost_report import cost_report
from pondera.inference.load import load
from pondera.training.train import train

RANDOM = "AdaptiveLatentCoT(steps=2, halting='random', continue_prob=0.5)"
ROUTER = "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.85)"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return training_worker.write_text(tmp_path_factory.mktemp("adaptive") / "text")


def test_flops_are_those_of_the_passes_that_ran(text: Path, tmp_path: Path):
    run = train(training_worker.tiny(text, {"think": RANDOM}), tmp_path / "run", progress=False)
    result, model = run.result(), load(str(run.path), "cpu").model
    assert 1 < result["passes_per_token"] < 3
    assert result["passes_per_token"] == pytest.approx(sum(result["pass_shares"]))
    measured = cost_report(model, 32, shares=result["pass_shares"])
    assert result["inference_flops_per_token"] == measured["inference_flops_per_token"]
    assert result["kv_bytes_per_token"] == measured["kv_bytes_per_token"]
    least, most = (
        cost_report(model, 32, shares=shares)["training_flops_per_token"] for shares in ([1, 0, 0], [1, 1, 1])
    )
    assert least < result["train_flops"] / result["train_tokens"] < most
    flops = [line["train_flops"] for line in run.metrics()]
    assert flops == sorted(flops) and flops[-1] == result["train_flops"]
    assert len({later - earlier for earlier, later in zip(flops, flops[1:], strict=False)}) > 1  # each step draws anew


# Under the last, no token gets far enough to run the second gate.
@pytest.mark.parametrize("think", [ROUTER, "AdaPonderLM(steps=2)", "AdaPonderLM(steps=2, threshold=0.999)"])
def test_resumed_is_what_it_would_have_been(think: str, text: Path, tmp_path: Path):
    config = training_worker.tiny(text, {"think": think, "train.keep": 2})
    straight = train(config, tmp_path / "straight", progress=False)
    assert {"next_token", "thinking"} == straight.metrics()[-1]["terms"].keys()
    again = Run(tmp_path / "again")
    shutil.copytree(straight.path, again.path)
    shutil.rmtree(again.checkpoints()[-1])
    shutil.rmtree(again.model_dir)
    again.result_file.unlink()
    train(config, again.path, resume=True, progress=False)
    weights = [(run.model_dir / "model.safetensors").read_bytes() for run in (straight, again)]
    assert weights[0] == weights[1]
    assert again.result()["train_flops"] == straight.result()["train_flops"]
    assert again.result()["pass_shares"] == straight.result()["pass_shares"]


def test_micro_batches_change_nothing_but_rounding(text: Path, tmp_path: Path):
    runs = [
        train(
            training_worker.tiny(text, {"think": ROUTER, "train.micro_batch_size": size}),
            tmp_path / str(size),
            progress=False,
        )
        for size in (4, 1)
    ]
    for whole, parts in zip(*(run.metrics() for run in runs), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["terms"]["thinking"] == pytest.approx(whole["terms"]["thinking"], rel=1e-3)

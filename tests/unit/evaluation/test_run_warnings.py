"""What went wrong in a run is named where it ends and in its report; what did not is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import training_worker

from pondera.cli.main import main
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.evaluation.halting_collapse import halting_collapse
from pondera.evaluation.run_warnings import run_warnings
from pondera.report.page import write_report
from pondera.training.train import train

SAID = "it decides nothing"
LATENT = "AdaptiveLatentCoT(steps=2, halting='router', threshold={})"
ALL_HALT, ALL_GO_ON, SOME = LATENT.format(0.995), LATENT.format(0.05), "ThinkAtHard(steps=1)"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return training_worker.write_text(tmp_path_factory.mktemp("collapse") / "text")


@pytest.mark.parametrize(
    ("shares", "think", "said"),
    [
        ([1.0, 0.0], ALL_HALT, "1 pass: it decides nothing; lower the penalty of AdaptiveLatentCoT"),
        ([1.0, 0.001, 0.0], ALL_HALT, "1 pass: it"),
        ([1.0, 1.0, 0.9995], ALL_GO_ON, "3 passes: it decides nothing; raise the penalty of AdaptiveLatentCoT"),
        ([1.0, 0.9999, 0.0], "PonderLM3(thoughts=2)", "2 passes: it decides nothing; change the penalty of PonderLM3"),
        ([1.0, 0.0], "UniversalTransformer(steps=1)", "lower the ponder_cost of UniversalTransformer"),
        ([1.0, 1.0], "ThinkAtHard(steps=1)", "raise the threshold of ThinkAtHard"),
        ([1.0, 0.0], "Unheard(of=1)", "lower the weight of its penalty"),
        ([1.0, 0.002], ALL_HALT, None),
        ([1.0, 0.998], ALL_HALT, None),
        ([1.0, 1.0, 0.3], ALL_HALT, None),
        ([1.0], ALL_HALT, None),
        ("damaged", ALL_HALT, None),
    ],
)
def test_what_counts_as_deciding_nothing(shares, think, said):
    found = halting_collapse({"halting_rule": "router", "pass_shares": shares}, think)
    assert found is None if said is None else found is not None and said in found
    assert halting_collapse({"halting_rule": None, "pass_shares": shares}, think) is None, "a control decides"


@pytest.mark.parametrize("think", [ALL_HALT, ALL_GO_ON])
def test_a_collapsed_router_is_noticed(think: str, text: Path, tmp_path: Path, capsys):
    config = training_worker.write_config(tmp_path / "config.yaml", training_worker.tiny(text, {"think": think}))
    assert main(["train", config, "--out", str(tmp_path / "run")]) == 0
    taken = "1 pass" if think == ALL_HALT else "3 passes"
    lines = [line for line in capsys.readouterr().out.splitlines() if SAID in line]
    assert len(lines) == 1 and f"warning:           halting by router gives every token {taken}" in lines[0]
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert f"halting by router gives every token {taken}: {SAID}" in page


@pytest.mark.parametrize("think", [SOME, "AdaptiveLatentCoT(steps=1, halting='random', continue_prob=0.0)", None])
def test_what_decides_or_never_had_to_is_not(think: str | None, text: Path, tmp_path: Path, capsys):
    """A decider that sends some tokens on; a control that sends none, as it was told; and no think method."""
    config = training_worker.write_config(tmp_path / "config.yaml", training_worker.tiny(text, {"think": think}))
    assert main(["train", config, "--out", str(tmp_path / "run")]) == 0
    assert SAID not in capsys.readouterr().out
    result = Run.open(tmp_path / "run").result() or {}
    assert result["halting_rule"] == ("decider" if think == SOME else None)
    if think == SOME:
        assert 0.001 < result["pass_shares"][1] < 0.999
    assert SAID not in write_report([tmp_path / "run"], tmp_path / "report.html").read_text()


def test_resuming_a_finished_run_says_it_again(text: Path, tmp_path: Path, capsys):
    train(training_worker.tiny(text, {"think": ALL_HALT}), tmp_path / "run", progress=False)
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert SAID in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "noticed"), [(1e-2, False), (1.0, True)])
def test_a_learning_rate_that_destroys_the_model_is_noticed(
    rate: float, noticed: bool, text: Path, tmp_path: Path, capsys
):
    """One that leaves the loss finite; where it is not, training stops (`tests/unit/training/test_train.py`)."""
    tiny = training_worker.tiny(text, {"think": None, "train.lr": rate})
    config = training_worker.write_config(tmp_path / "config.yaml", tiny)
    assert main(["train", config, "--out", str(tmp_path / "run")]) == 0
    assert ("nothing was learned; train longer or lower train.lr" in capsys.readouterr().out) == noticed
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert ("that of guessing any of 300 tokens" in page) == noticed


def test_results_without_a_vocabulary_are_not_judged():
    assert run_warnings({"loss": 99.0}, RunConfig()) == run_warnings({}, RunConfig()) == []

"""`pondera train flow-set`: the four numbers together, and the rules of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pondera.cli.main import main


def test_a_flow_is_trained_and_its_four_numbers_are_printed_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    words = ["train", "flow-set", "--objective", "TB(alpha=0.7)", "--train.steps", "20", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    for wanted in (
        "modes found:",
        "a perfect sampler:",
        "mean reward:",
        "distance to R/Z:",
        "total variation",
        "slope",
    ):
        assert wanted in said
    assert "TB(alpha=0.7) on Set(16, choose=8)" in said and "of 65 in 320 samples" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["objective"] == "TB(alpha=0.7)"
    result = json.loads((out / "result.json").read_text())
    assert {"modes_found", "perfect_modes", "mean_reward", "target_mean_reward", "tv", "spearman", "slope"} <= set(
        result
    )
    assert main(["train", str(out), "--resume"]) == 0
    assert capsys.readouterr().out == said
    assert main(words) == 2
    assert "already contains a run" in capsys.readouterr().err


def test_a_file_of_the_user_extends_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(
        "base: flow-set\nname: mine\nenvironment: \"Table([('s','x'), ('s','y')], {'x': 1.0, 'y': 3.0})\"\n"
    )
    assert main(["train", str(tmp_path / "mine.yaml"), "--train.steps", "5", "--out", str(tmp_path / "run")]) == 0
    assert "of 1 in 80 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "flow-set", "--objective", "TB(alpha=1.2)"], "alpha=1.2: give a number between 0 and 1"),
        (["train", "flow-set", "--objective", "DTB()"], "objective: unknown objective method 'DTB'"),
        (["train", "flow-set", "--environment", "Set("], "environment: cannot read this spec"),
        (["train", "flow-set", "--think", "PonderLM2()"], "unknown setting 'think'"),
        (
            ["train", "flow-set", "--train.epsilom", "0"],
            "unknown setting 'train.epsilom'; did you mean 'train.epsilon'",
        ),
        (["train", "flow-set", "--train.lr", "0"], "train.lr: a number above 0, got 0.0"),
        (["train", "flow-sets"], "unknown recipe 'flow-sets'; did you mean 'flow-set'"),
        (["train", "plain", "--objective", "TB()"], "unknown setting 'objective'"),
        (["compare", "flow-set", "plain"], "these are the settings of a GFlowNet"),
        (["eval", "flow-set"], ""),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

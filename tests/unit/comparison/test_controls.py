"""A model that learns which tokens take its passes is compared with one whose passes go to random tokens."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

from pondera.cli import compare as verb
from pondera.cli.main import main
from pondera.comparison.compare import compare
from pondera.comparison.controls import control_of, random_controls
from pondera.comparison.plan import PlannedVariant
from pondera.comparison.sweep import Sweep
from pondera.core import spec
from pondera.core.run_config import DataConfig, RunConfig
from pondera.core.run_folder import Run
from pondera.methods.think.common.halting import continue_prob_for

LEARNED = "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.97, penalty=0.3, ramp=(0.0, 0.1))"


@pytest.fixture
def names(recipe) -> list[str]:
    """A plain recipe, one that learns which tokens think, and one in which all do; enough steps to learn something."""
    return [
        recipe("plain"),
        recipe("learned", LEARNED, steps=12, lr=0.02),
        recipe("fixed", "AdaptiveLatentCoT(steps=2, halting='fixed')"),
    ]


def test_a_control_has_the_measured_passes_and_its_row_below(names, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["compare", *names, "--seeds", "2", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["plain", "learned", "learned-random", "fixed"]
    assert [row.get("control_of") for row in found["rows"]] == [None, None, "learned", None]
    learned, control = found["rows"][1:3]
    passes = round(statistics.fmean(learned["passes_per_token"]["values"]), 4)
    assert 1 < passes < 3, "otherwise this test says little"
    expected = continue_prob_for(passes, 2)
    for seed, run in enumerate(control["runs"]):
        assert run == f"runs/learned-random-{passes}passes-12steps-seed{seed}"
        config, own = Run.open(out / run).config, Run.open(out / learned["runs"][seed]).config
        method = spec.build(str(config.think), "think")
        assert method.halting.kind == "random" and method.steps == 2
        assert method.halting.continue_prob == pytest.approx(expected, abs=1e-4)
        assert (config.train, config.data, config.backbone, config.init) == (
            own.train,
            own.data,
            own.backbone,
            own.init,
        )
        assert config.name == "learned-random" and "random" in config.about
    assert control["passes_per_token"]["mean"] == pytest.approx(passes, abs=0.15)
    assert control["seeds"] == learned["seeds"] == [0, 1]
    [said] = [one for one in found["verdict"] if "learned-random" in one]
    assert (
        said.startswith("learned is ") and "learned-random, which gives the same passes to random tokens (95 %" in said
    )
    assert said in printed and "learned-random" in (out / "report.html").read_text()

    monkeypatch.setattr("pondera.training.train.train", lambda *_, **__: pytest.fail("trained again"))
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]
    assert main([*words, "--no-controls", "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in without["rows"]] == ["plain", "learned", "fixed"]
    assert verb.parser().parse(shlex.split(without["command"])[2:]).no_controls
    assert not verb.parser().parse(shlex.split(found["command"])[2:]).no_controls


def test_controls_are_trained_last_and_again_if_the_passes_have_changed(recipe, tmp_path, monkeypatch):
    """More seeds: the mean passes differ, so each seed gets a control with the new mean, next to the old one."""
    trained: list[str] = []

    def train(config: RunConfig, folder: Path, **_: Any) -> None:
        trained.append(folder.name)
        passes = 1.5 + config.train.seed / 10
        result = {"loss": 1.0, "passes_per_token": 1.0 if config.think is None else passes}
        Run.create(folder, config).write_result(result)

    monkeypatch.setattr("pondera.training.train.train", train)
    names, out = [recipe("learned", LEARNED), recipe("plain")], tmp_path / "out"
    compare(names, 1, out=out, progress=False)
    learned, plain = "learned-4steps-seed", "plain-4steps-seed"
    assert trained == [f"{learned}0", f"{plain}0", "learned-random-1.5passes-4steps-seed0"]
    trained.clear()
    found = compare(names, 2, out=out, progress=False)
    random = "learned-random-1.55passes-4steps-seed"
    assert trained == [f"{learned}1", f"{plain}1", f"{random}0", f"{random}1"]
    assert [row["name"] for row in found["rows"]] == ["learned", "learned-random", "plain"]
    assert found["rows"][1]["runs"] == [f"runs/{random}0", f"runs/{random}1"]
    trained.clear()
    compare(names, 2, out=out, progress=False, sweep=Sweep("train.lr", (1e-3, 1e-2)))
    assert trained[-2:] == [f"learned-random-lr0.001-1.55passes-4steps-seed{seed}" for seed in (0, 1)]
    assert {Run.open(out / "runs" / name).config.train.lr for name in trained[-2:]} == {1e-3}


def test_a_recipe_with_the_name_of_a_control_is_refused(recipe, tmp_path, capsys):
    words = ["compare", recipe("x", LEARNED), recipe("x-random"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "x-random is the name of the random control of x, which" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_control_needs_is_free(recipe, tmp_path):
    names = [recipe("x", "AdaptiveLatentCoT(steps=1, halting='fixed')"), recipe("x-random")]
    found = compare(names, 1, out=tmp_path / "out", progress=False)
    assert [row["name"] for row in found["rows"]] == ["x", "x-random"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"think": "PonderLM2(thoughts=1)"},
        {"think": "AdaptiveLatentCoT(steps=2, halting='fixed')"},
        {"think": LEARNED, "data": DataConfig(known_difficulty=True)},
    ],
)
def test_what_chooses_no_tokens_has_no_control(settings):
    assert control_of(RunConfig(name="x", **settings), 1.5) is None


@pytest.mark.parametrize(("passes", "count"), [(1.0, 0), (1.8, 1), (3.0, 0)])
def test_no_control_where_every_token_takes_the_same_passes(passes, count, tmp_path):
    variant = PlannedVariant(RunConfig(name="learned", think=LEARNED))
    for folder, config in variant.runs(2, tmp_path).items():
        Run.create(folder, config).write_result({"passes_per_token": passes})
    assert len(random_controls([variant], 2, tmp_path)) == count

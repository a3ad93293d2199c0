"""A sweep trains every value, compares the best one of each recipe with other seeds, and trains nothing twice."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pondera.cli import compare as verb
from pondera.cli.main import main
from pondera.comparison import sweep as module
from pondera.comparison.compare import compare
from pondera.comparison.sweep import Sweep, tune
from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.run_config import RunConfig, TrainConfig
from pondera.core.run_folder import Run

GIVEN = "train.lr=1e-2,1e-5,1e-3"
VALUES = (1e-5, 1e-3, 1e-2)


@pytest.mark.parametrize(
    "text, said",
    [
        ("train.lr", r"--sweep train.lr: give a setting and its values, e.g. --sweep train.lr=2e-3,4e-3,8e-3"),
        ("train.lrr=1,2", r"unknown setting to sweep 'train.lrr'; did you mean 'train.lr'"),
        (
            "train.steps=100,200",
            r"--sweep train.steps: only settings that leave cost and data equal can be tuned: train.lora_alpha, train.lr",
        ),
        ("data.text=a,b", r"--sweep data.text: only settings that leave cost and data equal"),
        ("train.lr=2e-3", r"--sweep train.lr=0.002: one value leaves nothing to choose; .* with --train.lr 0.002"),
        ("train.lr=2e-3,fast", r"'fast' is not a number"),
        ("train.lr=2e-3,", r"'' is not a number"),
        ("train.lr=true,1", r"'true' is not a number"),
        ("train.lr=2e-3,0.002", r"a value occurs twice"),
    ],
)
def test_what_cannot_be_swept(text, said):
    with pytest.raises(UserError, match=said):
        Sweep.parse(text)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--sweep", "train.lr=1,2", "--sweep", "train.lr=3,4"],
            "--sweep train.lr is given twice; put all values into",
        ),
        (
            ["--sweep", "train.lr=1,2", "--sweep", "train.beta1=0,0.5"],
            "one setting at a time, not train.lr and train.beta1",
        ),
        (["--sweep", "train.lr=1,2", "--train.lr", "3"], "and --train.lr: leave one of them out"),
        (["--sweep", "train.lr=1,-2"], "train.lr: a number above 0, got -2.0"),
    ],
)
def test_wrong_command_lines_are_refused_before_training(recipe, tmp_path, capsys, words, said):
    assert main(["compare", recipe("plain"), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_best_value_of_each_recipe_is_compared_with_other_seeds(recipe, tmp_path, monkeypatch, capsys):
    names, out = [recipe("plain"), recipe("ponder", "PonderLM2(thoughts=1)", lr=0.5)], tmp_path / "out"
    words = ["compare", *names, "--seeds", "2", "--sweep", GIVEN, "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    entry = found["sweep"]
    assert (entry["setting"], entry["values"], entry["seeds"]) == ("train.lr", list(VALUES), [1000])
    for row in found["rows"]:
        name = row["name"]
        runs = [Run.open(out / "tuning" / f"{name}-lr{value}-4steps-seed1000") for value in VALUES]
        assert [run.config.train.lr for run in runs] == list(VALUES)
        scores = [(run.result() or {})["bits_per_byte"] for run in runs]
        assert entry["scores"][name] == scores and len(set(scores)) == 3
        best = VALUES[scores.index(min(scores))]
        assert entry["chosen"][name] == best
        assert row["seeds"] == [0, 1]
        assert row["runs"] == [f"runs/{name}-lr{best}-4steps-seed{seed}" for seed in (0, 1)]
        assert {Run.open(out / run).config.train.lr for run in row["runs"]} == {best}
        assert f"{min(scores):.4f}*" in printed
    # After four steps from scratch, the largest learning rate is far ahead.
    assert entry["notes"] == [
        f"The best train.lr of {name} is the largest, 0.01; add larger ones." for name in ("plain", "ponder")
    ]
    assert all(note in printed for note in entry["notes"])
    assert Sweep.parse(shlex.split(found["command"])[-1]) == Sweep.parse(GIVEN)

    monkeypatch.setattr("pondera.training.train.train", lambda *_, **__: pytest.fail("trained again"))
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sweep"] == entry


def test_more_seeds_need_no_new_tuning(recipe, tmp_path, monkeypatch):
    name, sweep = recipe("plain"), Sweep("train.lr", (1e-3, 1e-2))
    compare([name], 1, out=tmp_path / "out", progress=False, sweep=sweep)
    trained: list[Path] = []
    original = module.train_all

    def noted(folders: dict[Path, RunConfig], *rest: Any) -> None:
        trained.extend(folder for folder in folders if not folder.exists())
        original(folders, *rest)

    monkeypatch.setattr("pondera.comparison.compare.train_all", noted)
    monkeypatch.setattr(module, "train_all", noted)
    compare([name], 2, out=tmp_path / "out", progress=False, sweep=sweep)
    assert [folder.name for folder in trained] == ["plain-lr0.01-4steps-seed1"]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Tunes two recipes whose runs are not trained: their scores are given."""

    def tuned(scores: dict[tuple[str, float], float], seeds: int = 3) -> tuple[dict[str, float], dict[str, Any]]:
        def write(folders: dict[Path, RunConfig], *_: Any) -> None:
            for folder, config in folders.items():
                Run.create(folder, config).write_result({"loss": scores[config.name, config.train.lr]})

        monkeypatch.setattr(module, "train_all", write)
        names = dict.fromkeys(name for name, _ in scores)
        configs = [RunConfig(name=name, train=TrainConfig(seed=7)) for name in names]
        return tune(configs, Sweep("train.lr", VALUES), seeds, tmp_path, False, 1)

    return tuned


def test_the_lowest_score_wins_and_ends_are_named(scored):
    scores = {"low": (1.0, 2.0, 3.0), "middle": (2.0, 1.0, 3.0), "high": (3.0, 2.0, 1.0)}
    chosen, entry = scored(
        {(name, value): score for name, of in scores.items() for value, score in zip(VALUES, of, strict=True)}
    )
    assert chosen == {"low": 1e-5, "middle": 1e-3, "high": 1e-2} == entry["chosen"]
    assert entry["score"] == "loss" and entry["seeds"] == [1007]
    assert entry["notes"] == [
        "The best train.lr of low is the smallest, 1e-05; add smaller ones.",
        "The best train.lr of high is the largest, 0.01; add larger ones.",
    ]


def test_nothing_is_smaller_than_zero():
    sweep = Sweep("train.weight_decay", (0.0, 0.1, 0.2))
    assert [bool(module._at_an_end("x", value, sweep)) for value in sweep.values] == [False, False, True]


def test_the_seed_of_a_sweep_is_never_compared(scored):
    _, entry = scored({("one", value): value for value in VALUES}, seeds=2000)
    assert entry["seeds"] == [2007] and 2007 not in range(7, 2007)


def test_a_value_that_cannot_be_trained_is_named(recipe, tmp_path):
    sweep = Sweep("train.lr", (1e-3, 1e30))
    with pytest.raises(Failure, match=r"the loss is (.|\n)*leave it out of --sweep train.lr=0.001,1e\+30"):
        compare([recipe("hot", steps=50, warmup=0.0)], 1, out=tmp_path / "out", progress=False, sweep=sweep)


def test_an_interrupted_sweep_says_how_to_continue(recipe, tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr(module, "train_all", interrupt)
    with pytest.raises(Interrupted) as stopped:
        compare([recipe("plain")], 1, out=tmp_path / "out", progress=False, sweep=Sweep.parse(GIVEN))
    _, _, *words = shlex.split(str(stopped.value).splitlines()[-1])
    args = verb.parser().parse(words)
    assert [Sweep.parse(text) for text in args.sweep] == [Sweep.parse(GIVEN)] and args.out == tmp_path / "out"


def test_runs_of_a_sweep_can_train_at_the_same_time(recipe, tmp_path):
    out, sweep = tmp_path / "out", Sweep("train.lr", (1e-3, 1e-2))
    found = compare([recipe("plain")], 1, out=out, progress=False, jobs=2, sweep=sweep)
    assert sorted(path.name for path in (out / "configs").iterdir()) == [
        f"plain-lr{value}-4steps-seed1000.yaml" for value in sweep.values
    ]
    assert found["rows"][0]["seeds"] == [0]

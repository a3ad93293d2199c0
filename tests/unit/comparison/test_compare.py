"""A comparison trains what is missing at equal cost, says no more than its seeds do, and can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from helpers import scripts, training_worker

from pondera.cli.main import main
from pondera.cli.parser import Parser
from pondera.comparison import demo, training
from pondera.comparison.compare import compare
from pondera.comparison.equal_cost import at_equal_flops, flops_per_step
from pondera.comparison.rows import MEASURES, summarise
from pondera.comparison.training import ended_early
from pondera.core.archive import ARCHIVE, unpack
from pondera.core.errors import Failure, Interrupted, UserError
from pondera.core.run_config import RunConfig, TrainConfig, load
from pondera.core.run_folder import Run
from pondera.report.page import write_report
from pondera.training.build import new_model
from pondera.training.trainer import PonderaTrainer

STEPS = 4
ENDLESS = 10**6


@pytest.fixture
def arms(recipe) -> list[str]:
    return [recipe("plain"), recipe("ponder", "PonderLM2(thoughts=1)")]


@pytest.fixture(scope="module")
def compared(text: Path, tmp_path_factory) -> Path:
    """Two arms, two seeds, at equal FLOPs and then, beside them, at equal tokens; `out` is a copy to change."""
    folder = tmp_path_factory.mktemp("compared")
    names = {"plain": None, "ponder": "PonderLM2(thoughts=1)"}
    tiny = [
        training_worker.tiny(text, {"name": name, "think": think, "train.steps": STEPS})
        for name, think in names.items()
    ]
    paths = [training_worker.write_config(folder / f"{config.name}.yaml", config) for config in tiny]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        found = {equal: compare(paths, 2, equal, out=folder / "out", progress=False) for equal in ("flops", "tokens")}
    (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def out(compared: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison's folder."""
    return shutil.copytree(compared / "out", tmp_path / "out")


def finished_run(folder: Path, name: str, seed: int, bits: float, **more: Any) -> Path:
    run = Run.create(folder / "runs" / f"{name}-{seed}", RunConfig(name=name, train=TrainConfig(seed=seed)))
    run.write_result({"bits_per_byte": bits, "train_tokens_per_second": 100.0, **more})
    return run.path


def verdict_of(folder: Path, plain: list[float], other: list[float]) -> str:
    runs = [finished_run(folder, "plain", seed, bits) for seed, bits in enumerate(plain)]
    runs += [finished_run(folder, "other", seed, bits) for seed, bits in reversed(list(enumerate(other)))]
    [said] = summarise(["plain", "other"], runs)["verdict"]
    return said


@pytest.mark.parametrize(
    "plain, other, said",
    [
        ([2.0], [1.9], "0.100 bits per byte below plain (one seed: significance unknown)."),
        (
            [2.0, 2.1],
            [1.95, 2.09],
            "0.030 bits per byte below plain (95 % CI ± 0.254, paired, 2 seeds: not significant).",
        ),
        ([2.0, 2.2, 2.1], [1.9, 2.11, 2.0], "0.097 bits per byte below plain (95 % CI ± 0.014, paired, 3 seeds: sig"),
        ([2.0, 2.2, 2.1], [2.1, 2.31, 2.2], "0.103 bits per byte above plain (95 % CI ± 0.014, paired, 3 seeds: sig"),
        # All of one sign, twice the standard error: the rule of thumb would have called it a finding.
        ([2.0, 2.0, 2.0], [1.99, 1.97, 1.95], "0.030 bits per byte below plain (95 % CI ± 0.050, paired, 3 seeds: not"),
    ],
)
def test_verdict(tmp_path, plain, other, said):
    assert f"other is {said}" in verdict_of(tmp_path, plain, other)


def test_seeds_are_paired_whatever_the_order_of_folders(tmp_path):
    runs = [finished_run(tmp_path, "plain", seed, 2.0 + seed) for seed in (0, 1, 2)]
    runs += [finished_run(tmp_path, "other", seed, 1.9 + seed) for seed in (2, 0, 1)]
    found = summarise(["plain", "other"], runs)
    gap = found["rows"][1]["bits_per_byte_against_baseline"]
    assert gap["values"] == pytest.approx([-0.1] * 3) and gap["spread"] == pytest.approx(0, abs=1e-9)
    assert found["rows"][1]["bits_per_byte"]["spread"] == pytest.approx(1.0)
    assert found["rows"][1]["runs"] == ["runs/other-2", "runs/other-0", "runs/other-1"]
    assert found["rows"][0]["bits_per_byte_against_baseline"]["values"] == [0, 0, 0]


def test_the_page_says_what_the_terminal_says(tmp_path):
    runs = [finished_run(tmp_path, "plain", seed, bits) for seed, bits in enumerate([2.0, 2.2, 2.1])]
    runs += [finished_run(tmp_path, "other", seed, bits) for seed, bits in enumerate([1.9, 2.11, 2.0])]
    [said] = summarise(["plain", "other"], runs)["verdict"]
    assert said in write_report(runs, tmp_path / "report.html").read_text()


def test_runs_of_earlier_versions_have_their_speed(tmp_path):
    path = finished_run(tmp_path, "plain", 0, 2.0)
    Run.open(path).write_result({"bits_per_byte": 2.0, "tokens_per_second": 321.0})
    assert summarise(["plain"], [path])["rows"][0]["train_tokens_per_second"]["values"] == [321.0]


def test_what_a_comparison_leaves(compared):
    found = json.loads((compared / "found.json").read_text())["tokens"]
    assert found == json.loads((compared / "out" / "results.json").read_text())
    assert {"equal", "seeds", "command", "baseline", "score", "rows", "verdict", "comparisons"} == set(found)
    assert found["baseline"] == "plain" and len(found["verdict"]) == 1
    for row, name in zip(found["rows"], ("plain", "ponder"), strict=True):
        assert row["name"] == name and row["seeds"] == [0, 1] and row["steps"] == STEPS
        results = [Run.open(compared / "out" / path).result() or {} for path in row["runs"]]
        assert row["bits_per_byte"]["values"] == [result["bits_per_byte"] for result in results]
        assert set(MEASURES) <= set(row)
    assert found["rows"][1]["passes_per_token"]["mean"] == 2
    assert "plain, ponder at equal tokens" in (compared / "out" / "report.html").read_text()
    words = shlex.split(found["command"])[2:]
    parser = Parser("compare", "", "")
    for name in ("--seeds", "--equal"):
        parser.add_argument(name)
    parser.add_argument("recipes", nargs="+")
    assert [Path(path).stem for path in parser.parse(words).recipes] == ["plain", "ponder"]


def test_equal_flops_are_equal(compared):
    plain, ponder = json.loads((compared / "found.json").read_text())["flops"]["rows"]
    spent, other = plain["train_flops"]["mean"], ponder["train_flops"]["mean"]
    assert ponder["steps"] < plain["steps"] == STEPS
    assert abs(spent - other) <= other / ponder["steps"]
    assert plain["train_tokens"]["mean"] > ponder["train_tokens"]["mean"]


def test_a_budget_sets_the_steps(text):
    config = training_worker.tiny(text, {"think": None})
    cost = flops_per_step(config)
    [set_to] = at_equal_flops([config], 7.2 * cost)
    assert set_to.train.steps == 7 and config.train.steps == 8
    with pytest.raises(UserError, match="one step of tiny costs"):
        at_equal_flops([config], 0.4 * cost)


def test_finished_runs_are_reused_and_json_is_all_that_is_printed(arms, out, monkeypatch, capsys):
    monkeypatch.setattr("pondera.training.train.train", lambda *_, **__: pytest.fail("trained again"))
    before = json.loads((out / "results.json").read_text())
    assert main(["compare", *arms, "--seeds", "2", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("command") == shlex.join(["pondera", "compare", *arms, "--seeds", "2", "--equal", "tokens"])
    assert found == {key: value for key, value in before.items() if key != "command"}


def test_another_config_or_text_is_refused(arms, out):
    with pytest.raises(UserError, match=r"plain-4steps-seed0: contains a run with another config; use another --out"):
        compare(arms, 2, out=out, overrides={"train.lr": 1e-4}, progress=False)
    run = Run.open(out / "runs" / "ponder-4steps-seed1")
    run.write_result({**(run.result() or {}), "corpus": "of another text"})
    with pytest.raises(UserError, match=r"ponder-4steps-seed1: contains a run on another text, .*remove that folder"):
        compare(arms, 2, out=out, progress=False)


def test_interrupted_and_gone_on_with(arms, out, monkeypatch):
    """SIGINT while the last run is trained: it is resumed, and ends as if nothing had happened."""
    last = Run(out / "runs" / "ponder-4steps-seed1")
    straight = [line["loss"] for line in last.metrics()]
    shutil.rmtree(last.path)
    original = PonderaTrainer.get_batch_samples

    def interrupt(self, *args):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PonderaTrainer, "get_batch_samples", interrupt)
        with pytest.raises(Interrupted, match=r"continue with:\npondera compare .*--seeds 2 .*--out ") as stopped:
            compare(arms, 2, out=out, progress=False)
    assert str(out) in str(stopped.value) and last.result() is None and len(last.metrics()) == 2
    compare(arms, 2, out=out, progress=False)
    assert [line["loss"] for line in last.metrics()] == straight


def when(happened, act) -> threading.Thread:
    """Does something as soon as something has happened."""

    def watch() -> None:
        while not happened():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_the_first_failure_stops_the_others(recipe, tmp_path, capsys):
    started = []

    class Noted(training.subprocess.Popen):
        """The second child only waits to be stopped: what a training does then is tested below."""

        def __init__(self, command: list[str], **kwargs: Any) -> None:
            wait = [sys.executable, "-c", "import time; time.sleep(600)"]
            super().__init__(wait if started else command, **kwargs)
            started.append(self)

    names = [recipe("hot", steps=ENDLESS, lr=1e30, warmup=0.0), recipe("long", steps=ENDLESS), recipe("later")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.subprocess, "Popen", Noted)
        with pytest.raises(
            Failure, match=rf"hot-{ENDLESS}steps-seed0: step \d+: the loss is (.|\n)*lower learning rate"
        ):
            compare(names, seeds=1, out=tmp_path / "out", jobs=2)
    assert f"hot-{ENDLESS}steps-seed0 ended early; stopping the others" in capsys.readouterr().err
    assert len(started) == 2 and all(child.returncode for child in started)
    assert not (tmp_path / "out" / "results.json").exists()


def test_several_at_once_can_be_stopped(recipe, tmp_path):
    names = [recipe("one", steps=ENDLESS), recipe("two", steps=ENDLESS), recipe("three")]
    runs = [Run(tmp_path / "out" / "runs" / f"{name}-{ENDLESS}steps-seed0") for name in ("one", "two")]
    thread = when(lambda: all(run.metrics() for run in runs), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="--jobs 2 --out "):
        compare(names, seeds=1, out=tmp_path / "out", jobs=2, progress=False)
    thread.join()
    for run in runs:
        [saved] = [step for step in run.checkpoints() if step.name == f"step-{run.metrics()[-1]['step']:06d}"]
        recipe_file = tmp_path / "out" / "configs" / f"{run.path.name}.yaml"
        assert run.env["command"] == shlex.join(["pondera", "train", str(recipe_file), "--out", str(run.path)])
        assert yaml.safe_load(recipe_file.read_text()) == run.config.to_dict()
        assert saved.is_dir() and run.result() is None
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == [run.path.name for run in runs]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "code, said, kind, message",
    [
        (2, "step 1\npondera: train.lr: more than 0, got -1\n", UserError, "NAME: train.lr: more than 0, got -1\n"),
        (1, "Traceback ...\npondera: no disk\nleft\n", Failure, "NAME: no disk\nleft\n"),
        (-9, "", Failure, "NAME: exit code -9\n"),
        (130, "pondera: stopped after step 3", Interrupted, "NAME was interrupted"),
        (-2, "", Interrupted, "NAME was interrupted"),
    ],
)
def test_how_a_child_ended(tmp_path, code, said, kind, message):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "NAME.txt").write_text(said)
    error = ended_early(tmp_path / "runs" / "NAME", code)
    assert type(error) is kind and str(error).startswith(f"{tmp_path}/runs/{message}")


def test_the_demo_answers_held_out_windows(tmp_path):
    small = {"data.windows": 600, "train.eval_tokens": 160, "train.steps": 2, "train.batch_size": 2}
    made = demo.demo(tmp_path, progress=False, settings=small)
    assert made.thinking_run.name == "adaptivelatentcot-2steps-seed0" and made.report.is_file()
    assert len(made.windows) == demo.SHOWN and all(len(window) == 16 for window in made.windows)
    assert [row["name"] for row in made.comparison["rows"]] == demo.RECIPES


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return scripts.load("experiments.common.publishing")


def test_what_is_published_names_no_path_of_this_machine(experiment, out, tmp_path):
    command = "python -m experiments.language.run --scale cpu --text text.jsonl --name books"
    experiment.publish(out, tmp_path / "results", "tokens", command)
    unpack(tmp_path / "results" / ARCHIVE, tmp_path / "unpacked")
    published = [
        path for folder in ("results", "unpacked") for path in (tmp_path / folder).rglob("*") if path.is_file()
    ]
    assert len(published) == 3 + 5 * len(list((out / "runs").iterdir()))
    for path in published:
        if path.name != ARCHIVE:
            assert str(tmp_path.parent) not in path.read_text() and "/tmp" not in path.read_text()
    assert json.loads((tmp_path / "results" / "tokens.json").read_text())["command"] == command
    run = Run.open(tmp_path / "unpacked" / "plain-4steps-seed0")
    assert run.config.data.text == "text" and run.result() and run.env["command"] == command
    assert f"`plain-4steps-seed0` | {run.config.train.seed} | 4 |" in (tmp_path / "results" / "runs.md").read_text()


def test_publishing_again_keeps_runs_that_are_gone(experiment, out, tmp_path):
    """A run whose folder was deleted since stays in the archive; the same runs give the same bytes."""
    kept, results = tmp_path / "kept", tmp_path / "results"
    shutil.copytree(out, kept)
    experiment.publish(kept, results, "tokens", "python it.py")
    first = (results / ARCHIVE).read_bytes()
    shutil.rmtree(kept / "runs" / "plain-4steps-seed0")
    experiment.publish(kept, results, "tokens", "python it.py")
    assert (results / ARCHIVE).read_bytes() == first


def test_every_arm_of_an_experiment_is_a_model():
    """What a long experiment is made of is found to fit before it starts."""
    language, tracking = (scripts.load(f"experiments.{name}.run") for name in ("language", "tracking"))
    every = [language.arms(2), *tracking.GROUPS.values()]
    for name, settings in (arm for group in every for arm in group.items()):
        config = load("plain", {"data.text": "stdlib", **settings, "name": name})
        assert new_model(config, vocab_size=300).config.think == config.think, name

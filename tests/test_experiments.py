"""Every experiment says how it is run, and its smoke size runs and publishes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import scripts

from pondera.core.archive import ARCHIVE

EXPERIMENTS = sorted(path.parent.name for path in (scripts.ROOT / "experiments").glob("*/run.py"))


@pytest.mark.parametrize("question", EXPERIMENTS)
def test_the_command_is_at_the_top_and_there_is_a_smoke_size(question: str):
    doc = scripts.load(f"experiments.{question}.run").__doc__
    commands = re.findall(r"^    python -m (\S+)(.*)", doc, re.MULTILINE)
    assert {module for module, _ in commands} == {f"experiments.{question}.run"}
    assert "--smoke" in commands[-1][1]
    assert f"| `{question}` |" in (scripts.ROOT / "experiments/README.md").read_text()


def test_a_smoke_run_writes_to_its_own_folder(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of a text that says {n * n} and little else.\n" for n in range(3000)))
    arguments = ["--scale", "cpu", "--smoke", "--jobs", "1", "--text", str(text)]
    command = [sys.executable, "-m", "experiments.heads.run", *arguments]
    paths = os.pathsep.join([str(scripts.ROOT), str(scripts.ROOT / "src")])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "runs"}
    results = tmp_path / "runs/smoke/results/heads/text-cpu"
    assert {path.name for path in results.iterdir()} == {"tokens.json", "runs.md", ARCHIVE}


def test_trained_runs_are_scored_on_tasks(tmp_path: Path):
    """The post-step of the language experiment: every run is scored once, and no folder of a run changes its name."""
    (tmp_path / "text.txt").write_text(
        "".join(f"Line {n} of a text that says {n * n} and little else.\n" for n in range(3000))
    )
    rows = [{"good": f"Line {n} of a text", "bad": f"Line of {n} a text", "group": n % 3} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.jsonl").write_text('{"text": "Line 3 of a text that says little"}\n' * 4)
    arguments = ["--scale", "cpu", "--smoke", "--jobs", "1", "--text", "text.txt", "--arms", "doubledepth", "plain"]
    arguments += ["--pairs", "pairs.jsonl", "--last-word", "words.jsonl", "--max-rows", "9"]
    command = [sys.executable, "-m", "experiments.language.run", *arguments]
    paths = os.pathsep.join([str(scripts.ROOT), str(scripts.ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs/smoke/results/language/text-cpu/tasks.json").read_text())
    assert found["command"].endswith("--pairs pairs.jsonl --last-word words.jsonl --max-rows 9")
    assert found["pairs"]["rows"] == 9 and found["pairs"]["group"] == "group" and found["last_word"]["rows"] == 4
    for task, measure in (("pairs", "macro_accuracy"), ("last_word", "log_probability_per_byte")):
        arms = found[task]["arms"]
        assert list(arms) == ["plain", "doubledepth"] and found[task]["comparisons"] == 1
        one, two = (arms[name][measure] for name in ("doubledepth", "plain"))
        assert list(one["by_seed"]) == ["0"] and two["against"] == {}
        difference = pytest.approx(one["mean"] - two["mean"])
        assert one["against"]["plain"]["difference"] == difference and one["against"]["plain"]["margin"] is None
    runs = tmp_path / "runs/smoke/runs/language/text-cpu"
    assert {path.name for path in (runs / "runs").iterdir()} == {"plain-4steps-seed0", "doubledepth-4steps-seed0"}
    kept = runs / "tasks/plain-4steps-seed0-pairs.json"
    assert json.loads(kept.read_text())["score"]["rows"] == 9


def test_variants_are_compared_over_their_seeds():
    tasks = scripts.load("experiments.language.tasks")
    scores = {
        "plain": {0: 0.50, 1: 0.52, 2: 0.51},
        "doubledepth": {0: 0.55, 1: 0.57, 2: 0.56},
        "thinking": {0: 0.70, 1: 0.60, 2: 0.65},
    }
    runs = {
        arm: {seed: {"accuracy": one, "groups": {"verb": {"rows": 2, "accuracy": one}}} for seed, one in seeds.items()}
        for arm, seeds in scores.items()
    }
    found = tasks.compared(runs, ["accuracy"])
    assert found["comparisons"] == 3
    against = {arm: found["arms"][arm]["accuracy"]["against"] for arm in scores}
    assert against["plain"] == {} and list(against["thinking"]) == ["plain", "doubledepth"]
    assert against["doubledepth"]["plain"]["difference"] == pytest.approx(0.05)
    assert against["doubledepth"]["plain"]["significant"] and against["doubledepth"]["plain"]["how"] == "paired"
    # Differences 0.20, 0.08, 0.14: standard error 0.0346, and t is 4.303 at 2 degrees of freedom.
    assert against["thinking"]["plain"]["margin"] == pytest.approx(4.303 * 0.06 / 3**0.5, rel=1e-3)
    assert found["arms"]["thinking"]["accuracy"]["mean"] == pytest.approx(0.65)
    assert found["arms"]["thinking"]["groups"] == {"verb": pytest.approx(0.65)}


def test_scores_of_a_run_are_kept_until_run_or_file_change(tmp_path: Path):
    tasks, calls = scripts.load("experiments.language.tasks"), []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: mine\n")
    result = tmp_path / "run/result.json"
    result.write_text("{}")
    task = tasks.Task(lambda run, file, max_rows: calls.append(max_rows) or {"accuracy": len(calls)}, ("accuracy",), ())

    def score(digest: str = "a", max_rows: int | None = None) -> int:
        kept = tmp_path / "kept.json"
        return tasks._kept(task, tmp_path / "run", kept, tmp_path / "file", digest, max_rows)["accuracy"]

    assert [score(), score(), score("b"), score("b", 3), score("b", 3)] == [1, 1, 2, 3, 3]
    result.write_text('{"again": 1}')
    assert score("b", 3) == 4

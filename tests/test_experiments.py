"""Every experiment says how it is run, and its smoke size runs and publishes nothing."""

from __future__ import annotations

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

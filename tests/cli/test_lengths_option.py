"""``pondera eval RUN --lengths``: the table and a mistake in processes of their own; the JSON and other mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import training_worker

from pondera.cli import main as cli
from pondera.cli.main import main
from pondera.training.train import train

SOURCES = Path(cli.__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on a task and one on text, each of one step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("runs")
        text = training_worker.write_text(folder / "text")
        task = {
            "data.task": "StateTracking('S3')",
            "data.tokenizer": "bpe-2048",
            "data.context": 12,
            "data.windows": 64,
        }
        return {
            name: train(
                training_worker.tiny(text, more | {"train.steps": 1}), folder / f"{name}-run", progress=False
            ).path
            for name, more in (("task", task), ("text", {}))
        }


def pondera(*words: object) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "COLUMNS": "200"}
    command = [sys.executable, "-m", "pondera", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def said(capsys):
    """Runs the command here; returns its exit code and what it wrote to stdout and stderr."""

    def call(*words):
        capsys.readouterr()
        return main(list(map(str, words))), *capsys.readouterr()

    return call


def test_the_table_has_a_row_for_each_length_and_json_the_same_numbers(runs: dict[str, Path], said):
    words = ("eval", runs["task"], "--lengths", "24, 12", "--max-tokens", 240)
    code, table, errors = pondera(*words)
    assert code == 0, errors
    code, text, _ = said(*words, "--json")
    found = json.loads(text)
    assert (code, found["trained"], [row["length"] for row in found["lengths"]]) == (0, 12, [24, 12])
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    head = next(line for line in table.splitlines() if "accuracy ┃" in line)
    assert "beyond 12" in head and "at 10" in head and "at 11" not in head
    for row, line in zip(found["lengths"], cells, strict=True):
        beyond = row["accuracy_beyond"]
        assert line[:4] == [
            str(row["length"]),
            f"{row['accuracy']:.4f}",
            "–" if beyond is None else f"{beyond:.4f}",
            f"{row['passes_per_token']:.3f}",
        ]
        assert line[4:6] == [f"{value:.2f}" for value in row["by_difficulty"]["accuracy"][:2]]
    assert found["lengths"][1]["accuracy_beyond"] is None != found["lengths"][0]["accuracy_beyond"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lengths", "16,x"], "argument --lengths: expected a whole number of at least 1, got 'x'"),
        (["--lengths", "16,,32"], "argument --lengths: expected a whole number of at least 1, got ''"),
        (["--lengths", "16,16"], "lengths: 16, 16 names a length twice"),
        (["--lengths", "16,99999"], "positions of this model; give"),
        (["--lengths", "16", "--effort", "0,1"], "--lengths and several efforts: give one --effort"),
        (["--lengths", "16", "--data.context", "8"], "--lengths and --data.context: "),
    ],
)
def test_mistakes_are_said(runs: dict[str, Path], words: list[str], complaint: str, said):
    code, out, errors = said("eval", runs["task"], *words)
    assert (code, out) == (2, "") and complaint in errors and len(errors.strip().splitlines()) == 1


def test_a_mistake_in_a_process_of_its_own_is_one_line(runs: dict[str, Path]):
    code, out, errors = pondera("eval", runs["text"], "--lengths", "16,32")
    assert (code, out) == (2, "") and "was trained on text" in errors and len(errors.strip().splitlines()) == 1


def test_one_effort_is_used(runs: dict[str, Path], said):
    code, text, errors = said("eval", runs["task"], "--lengths", "16", "--effort", 0, "--max-tokens", 160, "--json")
    assert code == 0, errors
    assert json.loads(text)["lengths"][0]["passes_per_token"] == 1

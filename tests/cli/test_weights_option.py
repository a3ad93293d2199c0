"""``--weights int8`` and ``--kernels``: what is named runs, and the loss of quality is measured and printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import saved_models

from pondera import UserError
from pondera.cli.main import main
from pondera.evaluation.open_model import open_model
from pondera.evaluation.perplexity import evaluate
from pondera.kernels import linear
from pondera.kernels.int8 import Int8
from pondera.kernels.products import why_not_used


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_models.save(tmp_path_factory.mktemp("models") / "plain")


def test_eval_prints_what_int8_costs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and nobody knows why. " * 12)
    words = ["eval", str(model), "--data.text", str(text), "--data.context", "48"]
    assert main([*words, "--weights", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = evaluate(open_model(model, device="cpu"), {"text": str(text), "context": 48})
    rounded = evaluate(open_model(model, device="cpu", weights="int8"), {"text": str(text), "context": 48})
    assert found["saved_weights"]["loss"] == pytest.approx(right["loss"], rel=1e-6)
    assert found["loss"] == pytest.approx(rounded["loss"], rel=1e-5) != pytest.approx(right["loss"], rel=1e-5)
    assert found["difference"] == {
        "score": "bits_per_byte",
        "value": pytest.approx(found["bits_per_byte"] - right["bits_per_byte"], rel=1e-6),
    }
    assert main([*words, "--weights", "int8"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  difference"))
    assert float(line.split()[1]) == pytest.approx(found["difference"]["value"], abs=6e-5)
    assert f"int8 minus the weights as saved ({right['bits_per_byte']:.4f})" in line


def test_generate_takes_both(model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    native: list[bool] = []
    floats: list[str] = []

    def seen(*arguments):
        native.append(True)
        return few_rows(*arguments)

    def read(self, dtype):
        floats.append(type(self).__name__)
        return as_floats(self, dtype)

    few_rows, as_floats = linear.few_rows, Int8._floats
    monkeypatch.setattr(linear, "few_rows", seen)
    monkeypatch.setattr(Int8, "_floats", read)
    words = ["generate", str(model), "--prompt", "The quick brown fox", "--greedy", "--max-new-tokens", "8"]
    written = {}
    for kernels in ("torch", "native"):
        assert main([*words, "--kernels", kernels]) == 0
        written[kernels] = capsys.readouterr().out
        assert bool(native) == (kernels == "native" and not why_not_used())
    assert written["torch"] == written["native"] and not floats
    for kernels in ("torch", "native"):
        assert main([*words, "--kernels", kernels, "--weights", "int8"]) == 0
        written[kernels] = capsys.readouterr().out
    assert written["torch"] == written["native"] and floats


def test_refused_where_it_says_nothing(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--weights: for the loss of a text"):
        from pondera.cli import evaluate as command

        command.run(command.parser().parse([str(model), "--weights", "int8", "--pairs", str(tmp_path / "no.csv")]))
    assert main(["eval", str(model), "--weights", "int4"]) == 2
    assert main(["eval", str(model), "--weights", "int8", "--lengths", "8"]) == 2

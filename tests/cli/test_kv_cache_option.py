"""``--kv-cache`` of ``pondera generate`` and ``pondera eval``: the method that is named is the one that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import saved_models, training_worker

import pondera
from pondera.cli.main import main
from pondera.core.escape import escape_lines
from pondera.evaluation.perplexity import evaluate
from pondera.inference.generate import generate
from pondera.inference.load import Loaded
from pondera.methods.kv_cache.common import calibration
from pondera.training.train import train

PROMPT = "The quick brown fox jumps over the lazy dog. The quick"
FEW = "StreamingLLM(8, sinks=2)"
FAST = "VQKV(4.0, window=8, codes=16, fitting='kmeans', vectors=256)"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: saved_models.save(folder / name, name) for name in ("plain", "ponderlm2", "concept")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "fox.txt"
    file.write_text(
        "The quick brown fox jumps over the lazy dog. It does so every morning, and nobody knows why. " * 30
    )
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PONDERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("runs")
        config = training_worker.tiny(training_worker.write_text(folder / "text"), {"think": None, "train.steps": 2})
        return train(config, folder / "run", progress=False).path


@pytest.fixture
def said(capsys):
    """Runs the command here; returns its exit code and what it wrote to stdout and stderr."""

    def call(*words):
        capsys.readouterr()
        return main(list(map(str, words))), *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["plain", "ponderlm2", "concept"])
def test_generate_uses_the_method(name: str, models, said):
    """The text is that of `pondera.load` with the method, and another one than with the full cache."""
    words = ["generate", models[name], "--prompt", PROMPT, "--greedy", "--max-new-tokens", 24]
    model, tokenizer = pondera.load(models[name], kv_cache=FEW, device="cpu")
    expected = generate(Loaded(model, tokenizer, name), PROMPT, 24, temperature=0.0).text
    code, out, _ = said(*words, "--kv-cache", FEW)
    assert code == 0 and out == f"{expected}\n" != said(*words)[1]


def test_eval_uses_the_method(models, text, said):
    words = ["eval", models["plain"], "--data.text", text, "--data.context", 64, "--max-tokens", 400, "--json"]
    full, few = (json.loads(said(*words, *more)[1]) for more in ([], ["--kv-cache", FEW]))
    model, tokenizer = pondera.load(models["plain"], kv_cache=FEW, device="cpu")
    expected = evaluate(Loaded(model, tokenizer, "plain"), {"text": str(text), "context": 64}, 400)
    assert few["loss"] == pytest.approx(expected["loss"], rel=1e-6) != pytest.approx(full["loss"], rel=1e-6)
    assert few["tokens"] == full["tokens"] == 400
    assert few["kv_bytes_per_token"] < 0.6 * full["kv_bytes_per_token"]


def test_passes_and_their_cost_stay(models, text, said):
    """A compressed cache changes no pass; at effort 0 there is one."""
    words = ["eval", models["ponderlm2"], "--data.text", text, "--data.context", 32, "--max-tokens", 60, "--json"]
    few, full = (json.loads(said(*words, *more, "--effort", "0,1")[1]) for more in (["--kv-cache", FEW], []))
    for name in ("passes_per_token", "pass_shares", "inference_flops_per_token"):
        assert [one[name] for one in few] == [one[name] for one in full]
    assert [one["passes_per_token"] for one in few] == [1, 2]


@pytest.mark.parametrize("think", [None, "PonderLM2(thoughts=1)"])
def test_a_task_is_scored_through_the_cache(think: str | None, tmp_path, said):
    """With all tokens kept the scores are those without a method; with few they are not, so the cache was read."""
    settings = {"think": think, "train.steps": 2, "data.task": "Copying()", "train.eval_tokens": 256}
    settings |= {"data.tokenizer": "bpe-2048", "data.windows": 64}
    path = train(training_worker.tiny(tmp_path, settings), tmp_path / "run", progress=False).path
    words = ["eval", path, "--max-tokens", 256, "--json"]
    full, all_kept, few = (
        json.loads(said(*words, *more)[1])
        for more in ([], ["--kv-cache", "PreallocatedCache()"], ["--kv-cache", "StreamingLLM(3, sinks=1)"])
    )
    assert all_kept["loss"] == pytest.approx(full["loss"], rel=1e-3) != pytest.approx(few["loss"], rel=1e-3)
    assert all_kept["pass_shares"] == few["pass_shares"] == full["pass_shares"]


def test_a_document_mask_is_not_used_with_it_and_that_is_said(tmp_path, said, caplog):
    text = training_worker.write_text(tmp_path / "text")
    config = training_worker.tiny(text, {"think": None, "train.steps": 1, "data.document_mask": True})
    path = train(config, tmp_path / "run", progress=False).path
    assert said("eval", path, "--max-tokens", 64, "--kv-cache", FEW)[0] == 0
    assert "data.document_mask: not used with a kv_cache method" in caplog.text


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_what_is_fitted_is_fitted_to_the_text_of_the_run(verb: str, run, said, caplog, monkeypatch):
    """Also without `--calibrate`; and it says how far it is."""
    caplog.set_level("INFO", "pondera")
    monkeypatch.setattr(calibration, "SAY_EVERY", 0.0)
    more = ["--prompt", "abc", "--max-new-tokens", 4] if verb == "generate" else ["--max-tokens", 64]
    code, _, err = said(verb, run, "--kv-cache", FAST, *more)
    assert code == 0, err
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("VQKV: ")]
    total = int(re.findall(r"fitting (\d+) codebooks to \d+ tokens", " ".join(lines))[0])
    counted = [
        int(found[1])
        for line in lines
        if (found := re.match(r"VQKV: (\d+) of \d+ codebooks fitted, about [0-9]", line))
    ]
    assert lines[0] == "VQKV: reading keys and values of the calibration text"
    assert counted == list(range(1, total))


def test_progress_of_fitting_is_not_a_line_per_codebook(run, said, caplog):
    caplog.set_level("INFO", "pondera")
    assert said("generate", run, "--kv-cache", FAST, "--prompt", "abc", "--max-new-tokens", 2)[0] == 0
    assert not [record for record in caplog.records if "codebooks fitted" in record.getMessage()]


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_combinations_that_are_refused(verb: str, models, text, run, tmp_path, said):
    end = ["--prompt", "a", "--max-new-tokens", 4] if verb == "generate" else ["--data.text", text]
    memory = training_worker.tiny(
        run.parent / "text", {"think": None, "memory": "TransformerXL(block=8)", "train.steps": 1}
    )
    trained = train(memory, tmp_path / "memory", progress=False).path
    for words, complaint in (
        ([models["plain"], "--kv-cache", "H20(8)"], "did you mean 'H2O'"),
        ([models["plain"], "--kv-cache", "PonderLM2()"], "is a think method"),
        (
            [models["plain"], "--kv-cache", FAST],
            "add calibrate='book.txt' (a text file, a folder or a dataset; on the comm",
        ),
        ([models["plain"], "--calibrate", text], "none is named"),
        ([models["ponderlm2"], "--kv-cache", "FastKV()"], "drops tokens from the hidden states between layers"),
        (
            [trained, "--kv-cache", FEW],
            "memory: TransformerXL(block=8) and kv_cache: StreamingLLM(8, sinks=2) cannot be",
        ),
    ):
        code, _, err = said(verb, *words, *end)
        assert code == 2 and complaint in err and "Traceback" not in err


def test_show_compute_prints_the_text_once(models, said):
    words = ["generate", models["ponderlm2"], "--prompt", "The quick", "--greedy", "--max-new-tokens", 12]
    code, streamed, _ = said(*words)
    shown = said(*words, "--show-compute")[1]
    assert code == 0 and len(streamed) > 5
    assert shown == f"The quick{escape_lines(streamed)}every token took 2 passes\n"

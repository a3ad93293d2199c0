"""``pondera compress``: memories side by side, the knee, and a model with its memory that every verb takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import saved_models

from pondera.cli.main import main
from pondera.core import spec
from pondera.evaluation import uses
from pondera.evaluation.kv_sweep import FITTED, SWEEP, sweep
from pondera.evaluation.windows import HeldOutWindows, held_out
from pondera.inference.load import load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

TEXT = "The quick brown fox jumps over the lazy dog. It does so every morning, and nobody knows why. " * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_models.save(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "fox.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def said(capsys):
    """Runs ``pondera compress`` here; returns its exit code and what it wrote to stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        code = main(["compress", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_everything_at_once(said, model: Path, text: Path, tmp_path: Path):
    out, plot = tmp_path / "small", tmp_path / "memory.html"
    words = [model, "--data.text", text, "--windows", 2, "--kv-cache", "H2O(0.5)", "--kv-cache", "StreamingLLM(9)"]
    code, shown, progress = said(*words, "--json", "--plot", plot, "--out", out, "--keep", "StreamingLLM(9)")
    found = json.loads(shown)
    full, *others = found["rows"]
    assert code == 0 and [row["method"] for row in found["rows"]] == [
        "PreallocatedCache()",
        "H2O(0.5)",
        "StreamingLLM(9)",
    ]
    assert full["of_full"] == full["agreement"] == 1.0 and all(row["of_full"] < 1 for row in others)
    assert "StreamingLLM(9): " in progress and "pondera generate" in progress
    page = plot.read_text()
    assert "<svg" in page and "StreamingLLM" in page and "Recall" in page
    loaded = load(out)
    assert loaded.model.config.kv_cache == "StreamingLLM(9)"
    assert main(["generate", str(out), "--prompt", "The", "--max-new-tokens", "4"]) == 0


def test_codebooks_are_fitted_and_written_with_the_model(said, model: Path, text: Path, tmp_path: Path):
    fast = "VQKV(4.0, window=8, codes=16, fitting='kmeans', vectors=256)"
    words = ["--data.text", text, "--windows", 2, "--kv-cache", fast, "--calibrate", text, "--out", tmp_path / "small"]
    code, shown, progress = said(model, *words, "--keep", fast, "--json")
    _, row = json.loads(shown)["rows"]
    assert code == 0 and "fitting" in progress and row["table_bytes"] > 0 and row["of_full"] < 0.7
    again = load(tmp_path / "small").model
    assert again.kv_cache is not None and again.kv_cache.fitted


def test_a_sweep_leaves_out_what_a_model_cannot_have(said, model: Path, text: Path):
    code, shown, progress = said(model, "--data.text", text, "--windows", 2, "--calibrate", text, "--json")
    rows = json.loads(shown)["rows"]
    assert code == 0 and [row["method"] for row in rows] == ["PreallocatedCache()", *SWEEP]
    assert all(f"{text}: skipped: calibration text too short" in progress for text in FITTED)


def test_a_full_cache_scores_what_the_model_scores(model: Path, text: Path):
    loaded = load(model)
    windows = held_out(loaded, {"data.text": str(text)}, 3)
    (full,), _ = sweep(loaded, ["PreallocatedCache()"], windows)
    ids_NT = windows.ids_NT
    with torch.no_grad():
        logits_NTV = loaded.model(ids_NT[:, :-1]).logits[:, windows.prompt :].double()
    nats = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), ids_NT[:, windows.prompt + 1 :].flatten())
    scored = ids_NT[:, windows.prompt + 1 :].numel()
    expected = float(nats) * scored / 0.6931471805599453 / windows.num_bytes
    assert full.bits_per_byte == pytest.approx(expected, rel=1e-5)
    spelled = "".join(loaded.tokenizer.decode(row[windows.prompt + 1 :].tolist()) for row in ids_NT)
    assert windows.num_bytes == len(spelled.encode())


def test_what_is_asked_for_was_read_before(model: Path, text: Path):
    windows = held_out(load(model), {"data.text": str(text)}, 3)
    for window, asked in zip(windows.ids_NT, windows.asked_NT, strict=True):
        passage = asked[-windows.asked :].tolist()
        begins = [n for n in range(windows.prompt) if window[n : n + windows.asked].tolist() == passage]
        assert begins and torch.equal(asked[: -windows.asked], window[:-1])


def test_recall_counts_what_comes_back(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that says what followed the latest earlier token like this one recalls what does not repeat."""
    loaded = load(model)
    windows = held_out(loaded, {"data.text": str(text)}, 2)
    # Texts in which no token repeats, but for the passage that is asked for.
    ids_NT = torch.stack([torch.randperm(279)[: windows.ids_NT.shape[1]] + 1 for _ in range(2)])
    asked_NT = torch.cat([ids_NT[:, :-1], ids_NT[:, 5 : 5 + windows.asked]], dim=1)

    def copies(self, part_BT, past_key_values, **unused):
        seen = past_key_values.read = [*getattr(past_key_values, "read", []), *part_BT[0].tolist()]
        logits = torch.zeros(1, part_BT.shape[1], 281)
        for place in range(part_BT.shape[1]):
            upto = seen[: len(seen) - part_BT.shape[1] + place + 1]
            before = [n for n in range(len(upto) - 1) if upto[n] == upto[-1]]
            logits[0, place, upto[before[-1] + 1] if before else 0] = 1.0
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(type(loaded.model), "__call__", copies)
    made = HeldOutWindows(ids_NT, windows.num_bytes, windows.prompt, asked_NT, windows.asked)
    assert sweep(loaded, ["PreallocatedCache()"], made)[0][0].recall == 1.0
    backwards_NT = torch.cat([ids_NT[:, :-1], ids_NT[:, 5 : 5 + windows.asked].flip(1)], dim=1)
    wrong = HeldOutWindows(ids_NT, windows.num_bytes, windows.prompt, backwards_NT, windows.asked)
    assert sweep(loaded, ["PreallocatedCache()"], wrong)[0][0].recall == 0.0


@pytest.mark.parametrize("text", SWEEP + FITTED)
def test_the_sweep_can_be_built(text: str):
    assert spec.format(spec.parse(text)) == text and spec.build(text, "kv_cache")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv-cache", "StremingLLM(4)"], "did you mean 'StreamingLLM'"),
        (["--kv-cache", "PonderLM2()"], "is a think method"),
        (["--kv-cache", "StreamingLLM(0)"], "at least 5"),
        (["--kv-cache", "ElasticMemory(4)"], "is a memory method; write memory: ElasticMemory"),
        (["--kv-cache", "VQKV(2)"], "give it with --calibrate"),
        (["--kv-cache", "VQKV(2)", "--calibrate", "TEXT"], "calibration text too short"),
        (["--kv-cache", "StreamingLLM(9)", "--keep", "H2O(0.5)"], "give --out FOLDER"),
        (["--data.context", "16"], "too few to compress"),
        (["--windows", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_words(said, model: Path, text: Path, words: list[str], says: str):
    code, shown, error = said(model, "--data.text", text, *(text if word == "TEXT" else word for word in words))
    assert (code, shown) == (2, "") and says in error and "Traceback" not in error


@pytest.mark.parametrize("wrong", ["StremingLLM(4)", "StreamingLLM(0)", "LazyLLM(layers=[9])", "VQKV(2)"])
def test_what_cannot_be_had_is_told_before_anything_is_measured(said, model: Path, text: Path, wrong: str):
    code, _, error = said(model, "--data.text", text, "--kv-cache", "H2O(0.5)", "--kv-cache", wrong)
    assert code == 2 and "bits per byte" not in error


def test_without_a_text_the_standard_library_is_read(said, model: Path, caplog: pytest.LogCaptureFixture):
    code, shown, _ = said(model, "--kv-cache", "StreamingLLM(0.5)", "--windows", "1")
    assert code == 0 and "StreamingLLM(0.5)" in shown
    assert "the standard library of this Python is the text" in caplog.text


def test_a_text_must_be_long_enough(said, model: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("The quick brown fox.")
    code, _, error = said(model, "--data.text", short)
    assert code == 2 and "give a longer --data.text" in error


def test_models_with_a_trained_memory_are_refused(said, text: Path, tmp_path: Path):
    model = load(saved_models.save(tmp_path / "plain")).model
    backbone = {**model.backbone.config.to_dict(), "model_type": "llama"}
    folder = tmp_path / "memory"
    AdaptiveLM(AdaptiveConfig(backbone=backbone, memory="TransformerXL(block=8, mems=8)")).save_pretrained(folder)
    saved_models.tokenizer().save_pretrained(folder)
    code, _, error = said(folder, "--data.text", text)
    assert code == 2 and "memory: TransformerXL(block=8, mems=8) and a kv_cache method cannot be combined" in error


def test_nothing_is_overwritten(said, model: Path, text: Path):
    code, _, error = said(model, "--data.text", text, "--out", model)
    assert code == 2 and "already exists" in error


@pytest.mark.parametrize(
    "given, message",
    [
        (["--for", "songs"], "questions"),
        (["--for", "chat"], "this model has 96 positions"),
        (["--for", "questions", "--budget", "a lot"], "25%"),
        (["--for", "questions", "--keep", "H2O(0.5)", "--out", "x"], "--keep does not go with --for"),
        (["--for", "questions", "--data.text", "x.txt"], "--data.text does not go with --for"),
        (["--tokens", "100"], "--tokens is for --for"),
        (["--budget", "0"], "25%"),
        (["--for", "questions", "--tokens", "9"], "at least 64"),
    ],
)
def test_uses_and_budgets_that_are_wrong(said, model: Path, given: list[str], message: str):
    code, _, progress = said(model, *given)
    assert code == 2 and message in progress


def test_a_budget_takes_the_best_row_within_it(said, model: Path, text: Path):
    methods = ["--kv-cache", "StreamingLLM(0.5)", "--kv-cache", "StreamingLLM(0.25)"]
    words = [model, "--data.text", text, "--windows", 2, *methods]
    code, shown, _ = said(*words, "--budget", "50%", "--json")
    found = json.loads(shown)
    fitting = [row for row in found["rows"] if row["of_full"] <= 0.5]
    assert code == 0 and found["elbow"] == min(fitting, key=lambda row: row["bits_per_byte"])["method"]
    code, _, progress = said(*words, "--budget", "1%")
    assert code == 2 and "no method was within 1 %" in progress


def test_for_questions(said, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = [
        {"context": f"a{n} is b{n}.", "qas": [{"question": f"a{n}?", "answers": [{"text": f"b{n}"}]}]}
        for n in range(20)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    monkeypatch.setattr(uses, "QUESTIONS", (f"Squad({str(tmp_path / 'x.json')!r})",))
    words = [model, "--for", "questions", "--tokens", 64, "--contexts", 2, "--kv-cache", "StreamingLLM(0.25)"]
    code, shown, progress = said(*words, "--out", tmp_path / "small")
    assert code == 0, progress
    assert "chosen: StreamingLLM(0.25)" in shown and "tokens/s" in shown and "saved with" in progress
    assert json.loads((tmp_path / "small" / "config.json").read_text())["kv_cache"] == "StreamingLLM(0.25)"

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import saved_models
from tokenizers import Tokenizer
from torch.nn import functional as F

from pondera.cli.evaluate import SHOWN
from pondera.cli.main import main
from pondera.core.errors import UserError
from pondera.core.run_config import DataConfig, RunConfig
from pondera.core.run_folder import Run
from pondera.data.corpus import prepare
from pondera.evaluation.cost_report import cost_report
from pondera.evaluation.perplexity import evaluate
from pondera.evaluation.score import score
from pondera.evaluation.trace import trace
from pondera.inference.load import Loaded, load
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

TEXT = "The quick brown fox jumps over the lazy dog; Größe, naïve, 日本語, 🙂!\n" * 4
NAMES = list(saved_models.THINKS)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("models")
    return {name: load(saved_models.save(folder / name, name), device="cpu") for name in NAMES}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def by_hand(found: Loaded, ids: list[int], context: int) -> float:
    """Nats: every token but the first is predicted from the at most `context` tokens of its window."""
    nats = 0.0
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor(ids[start : start + context + 1])
        with torch.no_grad():
            logits = found.model(window[None, :-1]).logits[0]
        nats += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return nats


@pytest.mark.parametrize("name", NAMES)
def test_whole_text_every_token_once(name: str, loaded: dict[str, Loaded], book: Path):
    ids = loaded[name].tokenizer.encode(TEXT)
    assert (len(ids) - 1) % 50, "the last window must be a partial one"
    found = evaluate(loaded[name], {"text": str(book), "context": 50})
    nats = by_hand(loaded[name], ids, 50)
    assert found["tokens"] == len(ids) - 1 and found["context"] == 50 and found["name"] == name
    assert found["bytes"] == len(TEXT.encode()) - len(loaded[name].tokenizer.decode(ids[0]))
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
    assert found["passes_per_token"] == (1 if name == "plain" else 2)
    prices = cost_report(loaded[name].model, 50)
    for key in ("inference_flops_per_token", "kv_bytes_per_token"):
        assert found[key] == prices[key] > 0
    assert found["tokens_per_second"] > 0
    assert not loaded[name].model.training
    json.dumps(found, allow_nan=False)


def test_text_shorter_than_a_window(loaded: dict[str, Loaded], tmp_path: Path):
    (tmp_path / "short.txt").write_text("lazy fox")
    ids = loaded["cot"].tokenizer.encode("lazy fox")
    found = evaluate(loaded["cot"], {"text": str(tmp_path / "short.txt")})
    assert found["tokens"] == len(ids) - 1 and found["context"] == 96
    assert found["loss"] * found["tokens"] == pytest.approx(by_hand(loaded["cot"], ids, 96), rel=1e-5)


@pytest.mark.parametrize("limit", [1, 49, 50, 51, 120])
def test_max_tokens_is_exact(limit: int, loaded: dict[str, Loaded], book: Path):
    tokenizer = loaded["plain"].tokenizer
    ids = tokenizer.encode(TEXT)
    found = evaluate(loaded["plain"], {"data.text": str(book), "data.context": "50"}, max_tokens=limit)
    assert found["tokens"] == limit
    assert found["loss"] * limit == pytest.approx(by_hand(loaded["plain"], ids[: limit + 1], 50), rel=1e-5)


def test_documents_are_told_apart(loaded: dict[str, Loaded], tmp_path: Path):
    texts = ["The quick brown fox", "jumps 🙂", "over"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    tokenizer = loaded["plain"].tokenizer
    ids: list[int] = []
    for text in texts:
        ids += [*([tokenizer.eos_token_id] if ids else []), *tokenizer.encode(text)]
    found = evaluate(loaded["plain"], {"text": str(path), "column": "body", "context": 16})
    first = len(tokenizer.decode(ids[0]).encode())
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == sum(len(text.encode()) for text in texts) - first
    assert found["loss"] * found["tokens"] == pytest.approx(by_hand(loaded["plain"], ids, 16), rel=1e-5)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    text = tmp_path / "own.txt"
    text.write_text("".join(f"Line {number} of this text, {number * 7919 % 1000}.\n" for number in range(600)))
    config = RunConfig(name="mine", data=DataConfig(text=str(text), tokenizer="bpe-300", context=32))
    corpus = prepare(config.data)
    made = Run.create(tmp_path / "run", config)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = {"model_type": "llama", "vocab_size": corpus.vocab_size, "max_position_embeddings": 64, **sizes}
    AdaptiveLM(AdaptiveConfig(backbone=backbone)).save_pretrained(made.model_dir)
    corpus.tokenizer().save_pretrained(made.model_dir)
    return made


def test_run_is_scored_on_what_it_held_out(run: Run, book: Path):
    held_out = prepare(run.config.data).validation
    expected = score(load(run.path, "cpu").model, held_out, 32, held_out.num_tokens)
    named = {"data.text": run.config.data.text}
    for found in (evaluate(run.path), evaluate(run.path, named)):
        assert found["pass_shares"] == expected["pass_shares"]
        numbers = expected.keys() - {"pass_shares"}
        assert {key: found[key] for key in numbers} == pytest.approx({key: expected[key] for key in numbers}, rel=1e-6)
        assert found["name"] == "mine" and found["context"] == 32
    assert evaluate(run.path, {"context": 16}, max_tokens=40)["tokens"] == 32
    other = evaluate(run.path, {"text": str(book)})
    assert other["tokens"] == len(load(run.path).tokenizer.encode(TEXT)) - 1 and other["context"] == 32


def test_run_whose_text_has_changed(run: Run):
    path = Path(run.config.data.text)
    path.write_text(path.read_text().replace("Line", "Row") * 2)
    with pytest.raises(UserError, match="has changed since"):
        evaluate(run.path)


def test_run_whose_text_has_changed_under_the_same_tokenizer(run: Run, tmp_path: Path):
    config, path = run.config, Path(run.config.data.text)
    prepare(config.data).tokenizer().save_pretrained(tmp_path / "tokenizer")
    config.data.tokenizer = str(tmp_path / "tokenizer")
    model_dir, run = run.model_dir, Run.create(tmp_path / "again", config)
    shutil.copytree(model_dir, run.model_dir)
    run.write_result({"corpus": prepare(config.data).digest})
    evaluate(run.path, max_tokens=32)
    path.write_text(path.read_text().replace("Line 300 ", "Line three hundred "))
    with pytest.raises(UserError, match="has changed since.*give another --data.text"):
        evaluate(run.path, max_tokens=32)
    run.result_file.unlink()  # an unfinished run: its checkpoint tells
    evaluate(run.path, max_tokens=32)
    with run.saving(1) as folder:
        (folder / "state.json").write_text(json.dumps({"corpus": "another"}))
    with pytest.raises(UserError, match="has changed since"):
        evaluate(run.path, max_tokens=32)


def test_own_text_by_another_name(run: Run, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture):
    """However it is spelled, only what was held out is scored; of a part of it, the user is told."""
    monkeypatch.chdir(tmp_path)
    expected = evaluate(run.path)
    copy = tmp_path / "copy" / "own.txt"
    copy.parent.mkdir()
    shutil.copy(run.config.data.text, copy)
    for name in ("own.txt", "./own.txt", "copy/../own.txt", str(copy)):
        assert evaluate(run.path, {"text": name})["tokens"] == expected["tokens"]
    assert "trained on" not in caplog.text
    (tmp_path / "other.txt").write_text(TEXT)
    evaluate(run.path, {"text": "other.txt"}, max_tokens=32)
    assert "trained on" not in caplog.text
    evaluate(run.path, {"text": "copy/.."}, max_tokens=32)  # the folder around it
    assert "trained on part of this text" in caplog.text


@pytest.mark.parametrize("context", [2, 13, 50])
def test_foreign_model_reads_bos_first(context: int, book: Path, tmp_path: Path):
    """Each window is BOS and context - 1 tokens of the text; BOS is not predicted, every token but the first is, once."""
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer.from_str(saved_models.tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=bos + 1, initializer_range=0.3, **sizes)).save_pretrained(
        tmp_path / "llama"
    )
    tokenizer.save_pretrained(tmp_path / "llama")
    loaded = load(tmp_path / "llama", "cpu")
    ids = loaded.tokenizer.encode(TEXT)
    assert ids[0] == bos
    nats, text = 0.0, ids[1:]
    for start in range(0, len(text) - 1, context - 1):
        window = torch.tensor([bos, *text[start : start + context]])
        with torch.no_grad():
            logits = loaded.model(window[None, :-1]).logits[0, 1:]
        nats += float(F.cross_entropy(logits, window[2:], reduction="sum"))
    found = evaluate(loaded, {"text": str(book), "context": context})
    assert found["tokens"] == len(text) - 1
    assert found["loss"] * found["tokens"] == pytest.approx(nats, rel=1e-5)
    with pytest.raises(UserError, match="at least 1 token after BOS, got 1; give 2"):
        evaluate(loaded, {"text": str(book), "context": 1})


def test_isolated_run_reads_other_documents_apart(run: Run, loaded: dict[str, Loaded], tmp_path: Path):
    texts = ["The quick brown fox", "jumps 🙂 over the dog", "over and over"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    run.config_file.write_text(run.config_file.read_text().replace("document_mask: false", "document_mask: true"))
    found = load(run.path, "cpu")
    eos = found.tokenizer.eos_token_id
    rows = [[*found.tokenizer.encode(text), eos] for text in texts]
    rows[-1].pop()
    nats = 0.0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        targets = torch.tensor([*row[1:], *(following or [])[:1]])
        with torch.no_grad():
            logits = found.model(torch.tensor([row])).logits[0, : len(targets)]
        nats += float(F.cross_entropy(logits, targets, reduction="sum"))
    scored = evaluate(found, {"text": str(tmp_path / "rows.jsonl"), "context": 64})
    assert scored["tokens"] == sum(map(len, rows)) - 1 <= 64
    assert scored["loss"] * scored["tokens"] == pytest.approx(nats, rel=1e-5)
    apart = evaluate(found, {"text": str(tmp_path / "rows.jsonl"), "context": 8})
    run.config_file.write_text(run.config_file.read_text().replace("document_mask: true", "document_mask: false"))
    assert (
        apart["loss"] != evaluate(load(run.path, "cpu"), {"text": str(tmp_path / "rows.jsonl"), "context": 8})["loss"]
    )


def test_json_has_every_number(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = saved_models.save(tmp_path / "model", "cot")
    assert main(["eval", str(folder), "--data.text", str(book), "--max-tokens", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key for key, _, _ in SHOWN} == {
        "accuracy", "permuted_accuracy", "loss", "perplexity", "bits_per_byte", "passes_per_token",
        "inference_flops_per_token", "kv_bytes_per_token", "tokens_per_second",
    }  # fmt: skip
    shown = {key for key, _, _ in SHOWN} - {"accuracy", "permuted_accuracy"}  # of tasks only
    assert found.keys() == shown | {"name", "context", "tokens", "bytes", "pass_shares"}
    assert all(found[key] > 0 for key in shown)


def test_what_cannot_be_scored(loaded: dict[str, Loaded], tmp_path: Path, book: Path):
    for name, content in {"empty.txt": b"", "blank.txt": b" \n", "binary.txt": b"\0\xff\x01", "one.txt": b"T"}.items():
        (tmp_path / name).write_bytes(content)
    for data, complaint in (
        ({"text": str(tmp_path / "bok.txt")}, "did you mean"),
        ({"text": str(tmp_path / "empty.txt")}, "empty"),
        ({"text": str(tmp_path / "blank.txt")}, "empty"),
        ({"text": str(tmp_path / "binary.txt")}, "binary"),
        ({"text": str(tmp_path / "one.txt")}, "too short"),
        ({"text": str(book), "context": 97}, "96 positions"),
        ({"text": str(book), "context": 0}, "at least 1"),
        ({"text": str(book), "context": "many"}, "data.context: expected int"),
        ({"txt": str(book)}, "did you mean"),
        ({"text": str(book), "tokenizer": "bpe-300"}, "has its own"),
        ({}, "not from a run"),
    ):
        with pytest.raises(UserError, match=complaint):
            evaluate(loaded["plain"], data)
    with pytest.raises(UserError, match="max_tokens=0"):
        evaluate(loaded["plain"], {"text": str(book)}, max_tokens=0)


@pytest.mark.parametrize("name", ["plain", "cot"])
def test_trace(name: str, loaded: dict[str, Loaded]):
    model, tokenizer = loaded[name].model, loaded[name].tokenizer
    found = trace(model, tokenizer, TEXT, context=40)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(TEXT)[:39]]
    assert len(found["tokens"]) == len(found["passes"]) == len(found["nll"]) == 39
    assert TEXT.startswith("".join(found["tokens"]).rstrip("\ufffd"))
    assert set(found["passes"]) == {1.0 if name == "plain" else 2.0}
    assert sum(found["nll"]) == pytest.approx(by_hand(loaded[name], ids, 40), rel=1e-5)
    assert len(trace(model, tokenizer, "fox", 40)["tokens"]) == len(tokenizer.encode("fox"))
    for text, context in (("", 40), ("fox", 1)):
        with pytest.raises(UserError, match="no token to trace"):
            trace(model, tokenizer, text, context)


def test_trace_leaves_the_mode(loaded: dict[str, Loaded]):
    model = load(Path(loaded["plain"].model.name_or_path)).model.train()
    trace(model, loaded["plain"].tokenizer, "fox", 40)
    assert model.training


class TestEffort:
    """The knob of `eval`: less thinking, and what it costs."""

    def test_half_the_effort_takes_fewer_passes_and_is_priced_so(self, loaded, book: Path):
        full, none = (evaluate(loaded["cot"], {"text": str(book)}, effort=effort) for effort in ("high", 0))
        assert (full["passes_per_token"], none["passes_per_token"]) == (2, 1) and full["loss"] != none["loss"]
        assert none["inference_flops_per_token"] < full["inference_flops_per_token"]
        assert none["kv_bytes_per_token"] == full["kv_bytes_per_token"] / 2

    def test_a_model_that_cannot_think_says_so(self, loaded, book: Path):
        with pytest.raises(UserError, match="one pass per token"):
            evaluate(loaded["plain"], {"text": str(book)}, effort="low")

    def test_several_efforts_make_a_curve(self, tmp_path: Path, book: Path, capsys):
        path = str(saved_models.save(tmp_path / "cot", "cot"))
        words = ["eval", path, "--data.text", str(book), "--max-tokens", "50", "--effort"]
        assert main([*words, "0,1"]) == 0
        printed = capsys.readouterr().out
        assert "Δ bits/byte" in printed and "1.000" in printed and "2.000" in printed
        assert main([*words, "0,1", "--json"]) == 0
        none, full = json.loads(capsys.readouterr().out)
        assert (none["effort"], none["passes_per_token"], full["passes_per_token"]) == (0, 1, 2)
        assert main([*words, "hihg"]) == 2
        assert "'high'" in capsys.readouterr().err

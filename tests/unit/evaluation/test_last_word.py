"""Last words: which tokens are the target, scores by hand, cuts, and texts that are refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import saved_models

from pondera.core.errors import UserError
from pondera.evaluation.last_word import score_last_words
from pondera.inference.load import Loaded, load

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    'The quick brown fox jumps over the lazy dog.\n\n"The fox," said the dog.  \n',
    "Größe, naïve, 日本語",
    "lazy 🙂",
    "word",
    "over the\tquickest",
]
WORDS = ["dog", "dog.", "日本語", "🙂", "word", "quickest"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(saved_models.save(tmp_path_factory.mktemp("models") / "plain"), "cpu")


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@torch.no_grad()
def by_hand(found: Loaded, text: str, word: str, context: int | None = None) -> tuple[float, bool, int, int]:
    """Nats, whether all tokens are the most probable, tokens and bytes; the target starts where no more of the text fits."""
    tokenizer = found.tokenizer
    ids, text = tokenizer.encode(text.rstrip()), text.rstrip()
    before = text[: len(text) - len(word)]
    first = next(n for n in range(len(ids), -1, -1) if before.startswith(tokenizer.decode(ids[:n])))
    nats, right, row = 0.0, True, [tokenizer.eos_token_id, *ids]
    for place in range(first + 1, len(row)):
        start = 0 if context is None else max(0, len(row) - 1 - context)
        logits_V = found.model(torch.tensor([row[start:place]])).logits[0, -1].double()
        nats -= float(logits_V.log_softmax(-1)[row[place]])
        right &= int(logits_V.argmax()) == row[place]
    return nats, right, len(ids) - first, len(text.encode()) - len(tokenizer.decode(ids[:first]).encode())


def test_the_scores_are_those_computed_by_hand(loaded: Loaded, tmp_path: Path):
    found = score_last_words(loaded, write(tmp_path / "texts.jsonl", TEXTS))
    expected = [by_hand(loaded, text, word) for text, word in zip(TEXTS, WORDS, strict=True)]
    nats, right, tokens, num_bytes = (list(column) for column in zip(*expected, strict=True))
    assert found["rows"] == 6 and found["cut"] == 0 and found["context"] == saved_models.POSITIONS
    assert found["nats_per_word"] == pytest.approx(sum(nats) / 6, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 6), rel=1e-4)
    assert found["log_probability_per_byte"] == pytest.approx(-sum(nats) / sum(num_bytes), rel=1e-5)
    assert found["tokens_per_word"] == sum(tokens) / 6 and found["accuracy"] == sum(right) / 6
    assert sum(num_bytes) >= len("".join(WORDS).encode())
    json.dumps(found, allow_nan=False)


def test_greedy_and_teacher_forcing_agree(loaded: Loaded, tmp_path: Path):
    """`generate` writes the same tokens exactly where a word counts as right."""
    text, tokenizer = "The quick brown fox jumps", loaded.tokenizer
    start = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 1, "attention_mask": torch.ones_like(start)}
    head: Any = loaded.model.get_output_embeddings()
    token = tokenizer.encode(" fox")[0]
    kept = head.weight.detach().clone()
    try:
        with torch.no_grad():
            hidden = loaded.model.states(start).h_BTD[0, -1]
            head.weight[token] = 100 * hidden / hidden.norm()  # the next token is now " fox", or its first piece
        assert loaded.model.generate(start, **arguments)[0, -1] == token
        one = tokenizer.decode([token]).strip()
        found = score_last_words(loaded, write(tmp_path / "texts.jsonl", [f"{text} {one}", f"{text} zzz"]))
        assert found["accuracy"] == 0.5
    finally:
        head.weight.data.copy_(kept)


@pytest.mark.parametrize("size", [1, 16])
def test_long_texts_are_cut_on_the_left(size: int, loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    texts = [f"{'lazy ' * count}dog" for count in (1, 5, 30, 60)]
    with caplog.at_level("INFO", "pondera"):
        found = score_last_words(loaded, write(tmp_path / "t.jsonl", texts), context=20, batch_size=size)
    assert "--last-word: 2 of 4 texts have more than 20 tokens and are cut on the left" in caplog.text
    expected = [by_hand(loaded, text, "dog", 20)[0] for text in texts]
    assert found["cut"] == 2 and found["context"] == 20
    assert found["nats_per_word"] == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_rows_columns_and_batches(loaded: Loaded, tmp_path: Path):
    rows = "".join(json.dumps({"body": text, "text": 3}) + "\n" for text in TEXTS)
    (tmp_path / "rows.jsonl").write_text(rows)
    some = score_last_words(loaded, tmp_path / "rows.jsonl", ["body"], max_rows=3)
    expected = [by_hand(loaded, text, word)[0] for text, word in list(zip(TEXTS, WORDS, strict=True))[::2]]
    assert some["rows"] == 3 and some["nats_per_word"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    one, many = (score_last_words(loaded, tmp_path / "rows.jsonl", ["body"], batch_size=size) for size in (1, 16))
    for key in ("accuracy", "nats_per_word", "log_probability_per_byte", "tokens"):
        assert one[key] == pytest.approx(many[key], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("", {}, "--last-word: t.jsonl:1 has a text without a word"),
        (" \n", {}, "--last-word: t.jsonl:1 has a text without a word"),
        (
            "a " + "b" * 99,
            {"context": 20},
            "the last word of t.jsonl:1 has 99 tokens, more than the context of 20",
        ),
        ("a b", {"columns": ["body"]}, "unknown column (of t.jsonl:1) 'body'"),
        ("a b", {"columns": ["a", "b"]}, "--columns: --last-word needs one column, such as text; got 2"),
        ("a b", {"max_rows": -1}, "max_rows=-1: give 1 or more"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    text: str, given: dict[str, Any], message: str, loaded: Loaded, tmp_path: Path
):
    with pytest.raises(UserError, match=re.escape(message)):
        score_last_words(loaded, write(tmp_path / "t.jsonl", [text]), **given)

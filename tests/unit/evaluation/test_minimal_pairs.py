"""Minimal pairs: scores by hand, ties, groups, columns, a part of the rows, and files that are refused."""

from __future__ import annotations

import json
import lzma
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import saved_models

from pondera.core.errors import UserError
from pondera.evaluation.minimal_pairs import score_pairs
from pondera.evaluation.significance import gap
from pondera.inference.load import Loaded, load

PAIRS = [
    {"sentence_good": "The dog jumps.", "sentence_bad": "The dog jump.", "UID": "verb"},
    {"sentence_good": "The quick fox", "sentence_bad": "The fox quick", "UID": "order"},
    {"sentence_good": "lazy dogs", "sentence_bad": "🙂 日本語 dogs lazy over", "UID": "order"},
    {"sentence_good": "a", "sentence_bad": "b", "UID": "letter"},
    {"sentence_good": "the lazy dog", "sentence_bad": "the lazy dog", "UID": "letter"},
    {"sentence_good": "jumps over the lazy dog", "sentence_bad": "over", "UID": "verb"},
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(saved_models.save(tmp_path_factory.mktemp("models") / "plain"), "cpu")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", PAIRS)


@torch.no_grad()
def log_probability(found: Loaded, text: str) -> float:
    """Token by token, each from all before it; the first from EOS."""
    total, seen = 0.0, [found.tokenizer.eos_token_id]
    for token in found.tokenizer.encode(text):
        total += float(found.model(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)[token])
        seen.append(token)
    return total


def points(found: Loaded, rows: list[dict[str, Any]]) -> list[float]:
    sums = [(log_probability(found, row["sentence_good"]), log_probability(found, row["sentence_bad"])) for row in rows]
    return [0.5 if good == bad else float(good > bad) for good, bad in sums]


def test_the_score_is_the_one_computed_by_hand(loaded: Loaded, pairs: Path):
    found, expected = score_pairs(loaded, pairs), points(loaded, PAIRS)
    assert 0 < statistics.fmean(expected) < 1 and {0.0, 0.5, 1.0} == set(expected), "the test needs all three"
    assert found["accuracy"] == pytest.approx(statistics.fmean(expected))
    assert found["rows"] == 6 and found["ties"] == 1 and found["columns"] == ["sentence_good", "sentence_bad"]
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["passes_per_token"] == 1 and found["rows_per_second"] > 0
    json.dumps(found, allow_nan=False)


def test_groups_count_alike(loaded: Loaded, pairs: Path):
    found, expected = score_pairs(loaded, pairs), points(loaded, PAIRS)
    by_hand = {
        name: [point for row, point in zip(PAIRS, expected, strict=True) if row["UID"] == name]
        for name in ("letter", "order", "verb")
    }
    means = {name: statistics.fmean(mine) for name, mine in by_hand.items()}
    assert found["group"] == "UID"
    assert found["groups"] == {name: {"rows": 2, "accuracy": means[name]} for name in means}
    assert found["macro_accuracy"] == pytest.approx(statistics.fmean(means.values()))
    margin = gap(dict(enumerate(means.values())), dict.fromkeys(range(3), 0.0)).margin
    assert margin is not None
    low, high = found["macro_accuracy"] - margin, found["macro_accuracy"] + margin
    assert found["macro_interval"] == pytest.approx([max(0, low), min(1, high)])


def test_unequal_groups_still_count_alike(loaded: Loaded, tmp_path: Path):
    right = max(PAIRS[:1] + PAIRS[3:4], key=lambda row: points(loaded, [row]))
    wrong = {"sentence_good": right["sentence_bad"], "sentence_bad": right["sentence_good"]}
    rows = [{**right, "kind": 1}, {**right, "kind": 1}, {**right, "kind": 1}, {**wrong, "kind": None}]
    found = score_pairs(loaded, write(tmp_path / "rows.jsonl", rows), group="kind")
    assert found["accuracy"] == 0.75 and found["macro_accuracy"] == 0.5
    assert {name: one["rows"] for name, one in found["groups"].items()} == {"1": 3, "None": 1}


def test_one_group_has_no_interval_and_none_is_needed(loaded: Loaded, tmp_path: Path):
    one = score_pairs(loaded, write(tmp_path / "one.jsonl", [{**PAIRS[0], "field": "syntax"}]), group="field")
    assert one["macro_interval"] is None and one["rows"] == 1
    rows = [{"good": "The dog", "bad": "The dg"}]
    found = score_pairs(loaded, write(tmp_path / "bare.jsonl", rows))
    assert found["columns"] == ["good", "bad"] and not found.keys() & {"group", "groups", "macro_accuracy"}


def test_columns_by_name_and_either_way_round(loaded: Loaded, pairs: Path):
    swapped = score_pairs(loaded, pairs, columns=("sentence_bad", "sentence_good"))
    assert swapped["accuracy"] == pytest.approx(1 - score_pairs(loaded, pairs)["accuracy"])


@pytest.mark.parametrize("kind", ["xz", "csv", "json", "parquet"])
def test_other_files_with_rows(kind: str, loaded: Loaded, pairs: Path, tmp_path: Path):
    path = tmp_path / f"again.{kind}"
    if kind == "xz":
        path = tmp_path / "again.jsonl.xz"
        path.write_bytes(lzma.compress(pairs.read_bytes()))
    elif kind == "csv":
        lines = ["good,bad,group", *(",".join([r["sentence_good"], r["sentence_bad"], r["UID"]]) for r in PAIRS)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(PAIRS))
    else:
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(PAIRS).rename(columns={"sentence_good": "good", "sentence_bad": "bad"}).to_parquet(path)
    found, expected = score_pairs(loaded, path), score_pairs(loaded, pairs)
    assert found["accuracy"] == expected["accuracy"] and found["groups"] == expected["groups"]


def test_some_rows_are_spread_over_the_file(loaded: Loaded, pairs: Path):
    found = score_pairs(loaded, pairs, max_rows=3)
    assert found["rows"] == 3
    assert {name: one["rows"] for name, one in found["groups"].items()} == {"verb": 1, "order": 1, "letter": 1}
    assert found["accuracy"] == pytest.approx(statistics.fmean(points(loaded, PAIRS[::2])))
    assert score_pairs(loaded, pairs, max_rows=100)["rows"] == 6


def test_a_model_of_transformers_scores_as_ours(loaded: Loaded, pairs: Path, tmp_path: Path):
    other = load(saved_models.checkpoint(tmp_path / "llama"), "cpu")
    other.model.load_state_dict(loaded.model.state_dict())
    mine, theirs = score_pairs(loaded, pairs), score_pairs(other, pairs)  # its BOS is the EOS of the tokenizer
    assert {**theirs, "name": "", "rows_per_second": 0} == {**mine, "name": "", "rows_per_second": 0}


def test_equal_texts_tie_in_any_batch(loaded: Loaded, tmp_path: Path):
    rows = [{"good": "a " * length + "b", "bad": "a " * length + "b"} for length in range(1, 20)]
    file = write(tmp_path / "ties.jsonl", rows)
    for size in (1, 3, 16, None):
        found = score_pairs(loaded, file, batch_size=size)
        assert found["ties"] == len(rows) and found["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("", {}, "--pairs: '.*' cannot be read as text (empty)"),
        ("\n", {}, "--pairs: '.*' has no rows; give a file with 2 columns of text"),
        ("not json", {}, "--pairs: rows.jsonl:1: not valid JSON"),
        ("[1, 2]", {}, "--pairs: rows.jsonl:1: expected an object"),
        ('{"yes": "a", "no": "b"}', {}, "rows.jsonl:1 has no columns sentence_good,sentence_bad or good,bad, but yes, no"),
        ('{"good": "a", "bad": "b"}\n{"good": "a"}', {}, "unknown column (of rows.jsonl:2) 'bad'"),
        ('{"good": "a", "bad": "b"}', {"columns": ["god", "bad"]}, "(of rows.jsonl:1) 'god'; did you mean 'good'"),
        ('{"good": "a", "bad": "b"}', {"columns": ["good"]}, "--columns: --pairs needs 2 columns, such as"),
        ('{"good": "a", "bad": "b"}', {"group": "UID"}, "unknown column (of rows.jsonl:1) 'UID'"),
        ('{"good": "a", "bad": 3}', {}, "--columns: field 'bad' of rows.jsonl:1 has type int, not text"),
        ('{"good": "a", "bad": ""}', {}, "--pairs: rows.jsonl:1 has a text without a token"),
        ('{"good": "a", "bad": "b"}', {"max_rows": 0}, "max_rows=0: give 1 or more"),
        ('{"good": "a", "bad": "b"}', {"batch_size": 0}, "batch_size=0: give 1 or more"),
        ('{"good": "a", "bad": "%s"}' % ("word " * 8), {"context": 16}, "tokens, more than the context of 16; give --data.c"),
        ('{"good": "a", "bad": "%s"}' % ("word " * 99), {}, "the model has 96 positions: remove the row"),
        ('{"good": "a", "bad": "b"}', {"context": 97}, "97 exceeds the 96 positions"),
        ('{"good": "a", "bad": "b"}', {"effort": 0.5}, "this model always runs one pass per token"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    content: str, given: dict[str, Any], message: str, loaded: Loaded, tmp_path: Path
):
    (tmp_path / "rows.jsonl").write_text(content)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=pattern):
        score_pairs(loaded, tmp_path / "rows.jsonl", **given)


def test_files_that_are_not_rows_are_refused(loaded: Loaded, pairs: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist; did you mean '.*pairs.jsonl'\?"):
        score_pairs(loaded, tmp_path / "pair.jsonl")
    with pytest.raises(UserError, match="is not a file; give a file with rows"):
        score_pairs(loaded, tmp_path)
    (tmp_path / "book.txt").write_text("A text.")
    with pytest.raises(UserError, match=r"is not a file with rows; give one of \.jsonl"):
        score_pairs(loaded, tmp_path / "book.txt")
    (tmp_path / "broken.jsonl.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"--pairs: .*\(damaged archive\)"):
        score_pairs(loaded, tmp_path / "broken.jsonl.xz")


def test_lone_surrogates_and_long_numbers_of_tokens_are_text(loaded: Loaded, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"good": "a\\ud800b", "bad": "a?b"}\n')
    found = score_pairs(loaded, tmp_path / "rows.jsonl")
    assert found["ties"] == 1 and math.isclose(found["accuracy"], 0.5)

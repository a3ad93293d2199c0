"""What is held out: the share that was asked for, whole texts where that is possible, and a word where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pondera.core.run_config import DataConfig
from pondera.data.corpus import prepare
from pondera.data.split import divide


def share(held_out: list[int], sizes: list[int]) -> float:
    return sum(sizes[row] for row in held_out) / sum(sizes)


@pytest.mark.parametrize("title", ["speech", "Untitled"])
@pytest.mark.parametrize("wanted", [0.02, 0.05, 0.5, 0.95])
def test_one_shared_title_does_not_decide(title: str, wanted: float, caplog: pytest.LogCaptureFixture):
    """By the hash of the name alone, nearly all or nearly nothing would be held out."""
    train, held_out = divide([title] * 400, [7] * 400, wanted)
    assert sorted(train + held_out) == list(range(400))
    assert wanted / 2 < share(held_out, [7] * 400) < min(2 * wanted, 1 - (1 - wanted) / 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "400 documents share 1 names" in caplog.text and "both splits" in caplog.text


@pytest.mark.parametrize("books", [10, 20, 40])
@pytest.mark.parametrize("series", range(6))
def test_parts_of_a_book_stay_together_where_books_are_small_enough(
    books: int, series: int, caplog: pytest.LogCaptureFixture
):
    names = [f"series {series}, book {number % books}" for number in range(books * 50)]
    train, held_out = divide(names, [9] * len(names), 0.1)
    assert not {names[row] for row in train} & {names[row] for row in held_out}
    assert 0.1 / 3 <= share(held_out, [9] * len(names)) <= 0.3
    assert not caplog.records


def test_a_share_that_cannot_be_had_is_told(caplog: pytest.LogCaptureFixture):
    assert [len(side) for side in divide(["a", "b"], [10, 10], 0.05)] == [1, 1]
    assert "5 % of the text was requested, and 50 % is held out: 1 of 2 whole documents" in caplog.text
    caplog.clear()
    assert [len(side) for side in divide([f"{n}" for n in range(12)], [10] * 12, 0.05)] == [11, 1]
    assert not caplog.records, "as near as whole documents come"


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 1000)), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
)
def test_every_document_is_on_one_side_and_no_side_is_empty(documents: list[tuple[str, int]], wanted: float):
    names, sizes = map(list, zip(*documents, strict=True))
    train, held_out = divide(names, sizes, wanted)
    assert train and held_out and sorted(train + held_out) == list(range(len(names)))
    assert divide(names, sizes, wanted) == (train, held_out)


def test_in_a_prepared_text(tmp_path: Path):
    rows = [{"title": "speech", "text": f"Row {n} of a long text, with the number {n * 37}. " * 12} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = prepare(DataConfig(text=str(tmp_path / "a.jsonl"), tokenizer="bpe-300", context=32), tmp_path / "cache")
    assert corpus.train.num_documents + corpus.validation.num_documents == 200
    assert 4 <= corpus.validation.num_documents <= 20

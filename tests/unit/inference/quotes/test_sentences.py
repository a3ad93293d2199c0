"""Sentences and passages: every character that is not white space lies in exactly one sentence, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pondera.inference.quotes.sentences import LONGEST, PASSAGE, passages, sentences


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end, _ in sentences(text)]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", []),
        (" \n\t ", []),
        ("One", ["One"]),
        ("It ran. It fell! Why? 3 times.", ["It ran.", "It fell!", "Why?", "3 times."]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("Mr. Smith met J. R. Hill, i.e. Bob. They ate.", ["Mr. Smith met J. R. Hill, i.e. Bob.", "They ate."]),
        ("It costs 3.5 dollars. e.g. nothing is cut", ["It costs 3.5 dollars. e.g. nothing is cut"]),
        ("wrapped\nlines of\none sentence. Next.", ["wrapped\nlines of\none sentence.", "Next."]),
        ("Title\n\nText.", ["Title", "Text."]),
        ("Title\r\n\r\nText.\r\nMore.", ["Title", "Text.", "More."]),
        ("a list:\n- one\n- two\n1. three", ["a list:", "- one", "- two", "1. three"]),
        ("海は広い。船が来る。", ["海は広い。", "船が来る。"]),
        ("「行け。」彼は言った。", ["「行け。」", "彼は言った。"]),
        ("\ufeffFirst. Second.", ["First.", "Second."]),
    ],
)
def test_examples(text: str, right: list[str]):
    assert cut(text) == right


@given(st.text(alphabet=st.sampled_from('ab Z.!?\n\r\t"”。」-#1é海\U0001f600'), max_size=200))
def test_nothing_is_lost_and_nothing_twice(text: str):
    end = 0
    for first, stop, _ in sentences(text):
        assert not text[end:first].strip("\ufeff") or not text[end:first].strip()
        assert first >= end and text[first:stop].strip() == text[first:stop] != ""
        end = stop
    assert not text[end:].strip()


def test_long_text_without_marks_is_cut_at_white_space():
    text = "word " * 1000
    found = cut(text)
    assert max(map(len, found)) <= LONGEST and " ".join(found) == text.strip()
    code = "\n".join(f"x{number} = {number}" for number in range(300))
    assert all(piece.startswith("x") for piece in cut(code))
    assert cut("x" * 1500) == ["x" * LONGEST, "x" * LONGEST, "x" * 300]


def test_passages_are_long_enough_and_not_too_long():
    text = "\n\n".join(" ".join(["A sentence of words."] * number) for number in (1, 3, 30, 100, 2))
    found = sentences(text)
    numbers = passages(found)
    assert numbers == sorted(numbers) and set(numbers) == set(range(max(numbers) + 1))
    for number in set(numbers):
        inside = [place for place, of in zip(found, numbers, strict=True) if of == number]
        assert inside[-1][1] - inside[0][0] <= PASSAGE
    assert passages([]) == []

"""Training a tokenizer ends, whatever the text is, and ends early when asked to."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pondera.core.interruptible import interruptible
from pondera.data import tokenizer as tokens
from pondera.data.tokenizer import LONGEST_WORD, _without_endless_words, train_tokenizer

KINDS = {"letters": "ACGT", "digits": "0123456789", "signs": "=-_+", "blanks": " \n\t", "kana": "あいうえお"}


def endless(kind: str, size: int) -> str:
    return "".join(random.Random(0).choices(KINDS[kind], k=size))


@pytest.mark.parametrize("kind", KINDS)
def test_endless_words_are_cut_for_training(kind: str):
    word = endless(kind, 5 * LONGEST_WORD + 3)
    text = f"A word: x{word}! and another" if kind == "letters" else f"A word:\u00b7x{word}y and another"
    pieces = list(_without_endless_words(text))
    assert "".join(pieces) == text and len(pieces) > 5
    backend = train_tokenizer([text], 300).backend_tokenizer
    longest = max(len(word) for piece in pieces for word, _ in backend.pre_tokenizer.pre_tokenize_str(piece))
    assert longest <= 3 * LONGEST_WORD + 8, "bytes: up to three a character"


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=300))
def test_any_other_text_is_learnt_as_it_stands(text: str):
    assert list(_without_endless_words(text)) == [text]


def test_a_folder_of_endless_words_gives_a_tokenizer():
    """Uncut, this takes minutes."""
    tokenizer = train_tokenizer([endless("letters", 400_000), endless("digits", 400_000)], 400)
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer.encode("ACGT 0123")) == "ACGT 0123"


def test_work_gives_its_result_or_its_error():
    assert interruptible(lambda stop: (threading.current_thread() is threading.main_thread(), stop.is_set())) == (
        False,
        False,
    )
    with pytest.raises(TimeoutError, match="mine"):
        interruptible(lambda stop: (_ for _ in ()).throw(TimeoutError("mine")))

    def texts():
        yield "a text"
        raise OSError("the disk is gone")

    with pytest.raises(Exception, match="the disk is gone"):
        train_tokenizer(texts(), 300)


def test_waiting_is_told():
    heard: list[float] = []
    done = threading.Event()

    def waiting(seconds: float) -> None:
        heard.append(seconds)
        if len(heard) == 3:
            done.set()

    assert interruptible(lambda stop: done.wait(60), waiting)
    assert heard == sorted(heard) and len(heard) >= 3


DEAF = """
import random
from pondera.data import tokenizer as tokens
tokens._without_endless_words = lambda text: [text]
tokens._tell_every_half_minute = lambda seconds: print("begins", flush=True)
tokens.train_tokenizer(["".join(random.Random(0).choices("ACGT", k=3_000_000))], 4000)
"""
READING = """
from pondera.data import tokenizer as tokens
def texts():
    print("begins", flush=True)
    while True:
        yield "the sea " * 100
tokens.train_tokenizer(texts(), 300)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a single process")
@pytest.mark.parametrize("program", [DEAF, READING], ids=["in compiled code", "while reading"])
def test_ctrl_c_ends_it(program: str):
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "begins\n"
        child.send_signal(signal.SIGINT)
        try:
            _, errors = child.communicate(timeout=60)  # left alone, it would take many times as long
        finally:
            child.kill()
    assert "KeyboardInterrupt" in errors and child.returncode in (-signal.SIGINT, 130, 1), errors


def test_long_texts_are_encoded_as_short_ones_are(monkeypatch: pytest.MonkeyPatch):
    tokenizer = train_tokenizer(["The quick brown fox. " * 20], 300)
    texts = ["The quick naïve fox. " * 5, "", "fox"]
    short = [(ids.tolist(), ends.tolist()) for ids, ends in tokens.encode(texts, tokenizer)]
    monkeypatch.setattr(tokens, "MANY", 1)
    assert [(ids.tolist(), ends.tolist()) for ids, ends in tokens.encode(texts, tokenizer)] == short

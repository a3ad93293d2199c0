from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.data.questions.base import Questions
from pondera.data.questions.squad import Squad

INDEX = spec.index(("questions",))
EXAMPLES = {f"{info.name}-{name}": text for info in INDEX.values() for name, text in info.examples.items()}
TOKENS = 600


def count(text: str) -> int:
    return len(text) // 4 + 1


def squad(path: Path, paragraphs: int = 12, suffix: str = "") -> Path:
    tree = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"Paragraph {number} says that the answer is word{number}. " * 5,
                        "qas": [
                            {"question": f"What does paragraph {number} say?", "answers": [{"text": f"word{number}"}]},
                            {"question": "Which one has no answer?", "answers": []},
                            {"question": "Is there another one?", "answers": [{"text": "yes"}, {"text": "Yes"}]},
                        ],
                    }
                    for number in range(paragraphs)
                ]
            }
        ]
    }
    path.write_bytes(lzma.compress(json.dumps(tree).encode()) if path.suffix == ".xz" else json.dumps(tree).encode())
    return path


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES)
def test_every_kind(text: str):
    kind: Questions = spec.build(text, "questions")
    drawn = kind.draw(count, TOKENS, contexts=3, seed=1)
    assert len(drawn) == 3
    for asked in drawn:
        assert TOKENS // 2 < count(asked.context) <= 1.1 * TOKENS and asked.questions
        for question in asked.questions:
            assert question.answer.strip() and question.answer[0].isspace()
            assert not question.text[-1:].isspace() and not question.answer[-1].isspace()
    assert kind.draw(count, TOKENS, contexts=3, seed=1) == drawn, "the same seed gives the same texts"
    assert kind.draw(count, TOKENS, contexts=3, seed=2) != drawn
    assert len({asked.context for asked in drawn}) == 3


@pytest.mark.parametrize("name", [text for text in EXAMPLES.values() if not text.startswith("Continuation")])
def test_the_context_has_each_answer_once_for_its_question(name: str):
    for asked in spec.build(name, "questions").draw(count, TOKENS, contexts=2, seed=0):
        for question in asked.questions:
            fact = question.text.rpartition("\n")[2].removeprefix("Answer: ") + question.answer
            assert asked.context.count(fact) == 1
            assert asked.context.count(question.text.rpartition("\n")[2].removeprefix("Answer: ")) == 1


def test_a_continuation_follows_its_context(tmp_path: Path):
    (tmp_path / "long.txt").write_text("".join(f"Line {number} of a long text.\n" for number in range(900)))
    (tmp_path / "other.txt").write_text("".join(f"Row {number} of another text.\n" for number in range(900)))
    kind = spec.build(f"Continuation({str(tmp_path)!r}, characters=90)", "questions")
    for asked in kind.draw(count, TOKENS, contexts=2, seed=0):
        question = asked.questions[0]
        whole = asked.context + question.text + question.answer
        assert any(whole in file.read_text() for file in tmp_path.glob("*.txt"))
        assert 80 <= len(question.answer) <= 100


@pytest.mark.parametrize("name", ["squad.json", "squad.json.xz"])
def test_squad(tmp_path: Path, name: str):
    kind = Squad(str(squad(tmp_path / name)), each=2)
    (asked,) = kind.draw(count, 300, contexts=1, seed=0)
    answers = [question.answer for question in asked.questions]
    assert " yes" in answers and len(answers) == 2 * asked.context.count("\n\n") + 2
    assert all(answer == " yes" or answer.strip() in asked.context for answer in answers)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Needles(0)", "give 1 to 32"),
        ("Needles(32)", "do not fit into 100 tokens"),
        ("Needles(digits=0)", "give 1 to 12"),
        ("FewShot(0)", "give 1 or more"),
        ("FewShot(500)", "ask fewer or give longer contexts"),
        ("Continuation(characters=0)", "give 1 or more"),
        ("Continuation('nowhere.txt')", "no such file"),
        ("Squad('nowhere.json')", "cannot be read"),
        ("Squad('x.json', each=0)", "give 1 or more"),
    ],
)
def test_what_cannot_be(text: str, message: str):
    with pytest.raises(UserError, match=message):
        spec.build(text, "questions").draw(count, 100, contexts=1, seed=0)


@pytest.mark.parametrize("content", ["not json", "[]", '{"data": 3}', '{"data": [{"paragraphs": [{"context": "x"}]}]}'])
def test_a_file_in_another_form(tmp_path: Path, content: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="not in the form of SQuAD"):
        Squad(str(tmp_path / "x.json")).draw(count, 100, contexts=1, seed=0)


def test_too_little_text(tmp_path: Path):
    file = squad(tmp_path / "squad.json", paragraphs=4)
    with pytest.raises(UserError, match="has text for 1 contexts of 300 tokens, and 2 are wanted"):
        Squad(str(file)).draw(count, 300, contexts=2, seed=0)
    (tmp_path / "short.txt").write_text("Only one line.")
    with pytest.raises(UserError, match="too little text|has 0 documents"):
        spec.build(f"Continuation({str(tmp_path / 'short.txt')!r})", "questions").draw(count, 300, 1, 0)
    with pytest.raises(UserError, match="too little text"):
        spec.build(f"Needles(2, text={str(tmp_path / 'short.txt')!r})", "questions").draw(count, 300, 1, 0)

"""Squad: questions about paragraphs, from a file in the form of SQuAD."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

from pondera.core.errors import UserError
from pondera.data.packed_files import opened
from pondera.data.questions.base import AskedContext, Count, Question, Questions


class Squad(Questions):
    """Paragraphs of a SQuAD or XQuAD file one after another, and the questions about each of them.

    The file is JSON, also compressed (``.xz``, ``.gz``):
    ``{"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": [{"text": ...}]}]}]}]}``.
    A question counts for its first answer. Questions without an answer are left out.

    Args:
        file: the path of the file.
        each: questions of each paragraph at most.

    Example::

        pondera bench kv smollm2 --questions "Squad('xquad.en.json')"
    """

    examples: ClassVar[dict[str, str]] = {}

    def __init__(self, file: str, each: int = 1) -> None:
        if each < 1:
            raise UserError(f"each={each}: give 1 or more")
        self.file, self.each = file, each

    def draw(self, count: Count, tokens: int, contexts: int, seed: int) -> list[AskedContext]:
        """See `Questions.draw`."""
        rng = random.Random(f"squad {seed}")
        found = self._read()
        rng.shuffle(found)
        drawn, position = [], 0
        for _ in range(contexts):
            taken, asked, left = [], [], tokens
            while position < len(found):
                text, questions = found[position]
                size = count(text + "\n\n")
                if size > left and taken:
                    break
                position += 1
                if size <= left:
                    taken.append(text)
                    asked += questions[: self.each]
                    left -= size
            if not asked or (position >= len(found) and left > tokens // 2):
                raise UserError(
                    f"{self.file!r} has text for {len(drawn)} contexts of {tokens} tokens, and {contexts} are wanted; give "
                    "fewer or shorter contexts, or a longer file"
                )
            drawn.append(AskedContext("\n\n".join(taken), tuple(asked)))
        return drawn

    def _read(self) -> list[tuple[str, list[Question]]]:
        """The paragraphs with their questions."""
        found: list[tuple[str, list[Question]]] = []
        try:
            with opened(Path(self.file).expanduser(), "Squad") as file:
                tree: Any = json.loads(file.read().decode("utf-8-sig"))
            for article in tree["data"]:
                for paragraph in article["paragraphs"]:
                    asked = [(qa["question"], qa["answers"]) for qa in paragraph["qas"]]
                    questions = [
                        Question(f"\n\nQuestion: {question}\nAnswer:", f" {answers[0]['text']}")
                        for question, answers in asked
                        if answers
                    ]
                    found.append((paragraph["context"], questions))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{self.file!r} is not in the form of SQuAD ({type(error).__name__}: {error}); expected JSON with data, "
                "paragraphs, context, qas, question, answers and text"
            ) from None
        if not any(questions for _, questions in found):
            raise UserError(f"{self.file!r} has no question with an answer")
        return found

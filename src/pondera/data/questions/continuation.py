"""Continuation: the text that follows a long piece of a document."""

from __future__ import annotations

import random
from typing import ClassVar

from pondera.core.errors import UserError
from pondera.data.questions.base import AskedContext, Count, Question, Questions
from pondera.data.text import open_text

LEAD = 60
"""Characters between context and answer, about."""
MARGIN = 4
"""Characters of a document for each token of its context; a document with fewer is not taken."""


class Continuation(Questions):
    """A piece of a document as context, and what follows it as answer: how well the rest is predicted.

    With ``text="stdlib"`` the documents are source files of the standard library, so the answer is code that uses names of the
    context. All of an answer is hardly ever decoded exactly; look at the nats.

    Args:
        text: as ``data.text``.
        characters: of an answer, about.

    Example:
        >>> one = Continuation(characters=100).draw(lambda text: len(text) // 4, tokens=300, contexts=1, seed=0)[0]
        >>> len(one.questions)
        1
    """

    examples: ClassVar[dict[str, str]] = {"default": "Continuation()"}

    def __init__(self, text: str = "stdlib", characters: int = 240) -> None:
        if characters < 1:
            raise UserError(f"characters={characters}: give 1 or more")
        self.text, self.characters = text, characters

    def draw(self, count: Count, tokens: int, contexts: int, seed: int) -> list[AskedContext]:
        """See `Questions.draw`."""
        rng, drawn = random.Random(f"continuation {seed}"), []
        needed = MARGIN * tokens + LEAD + 2 * self.characters
        documents = [one.text for one in open_text(self.text).read() if len(one.text) >= needed]
        rng.shuffle(documents)
        for document in documents:
            if len(drawn) == contexts:
                break
            begin = document.rfind("\n", 0, rng.randint(1, len(document) - needed + 1)) + 1
            if (asked := self._cut(document[begin:], count, tokens)) is not None:
                drawn.append(asked)
        if len(drawn) < contexts:
            raise UserError(
                f"{self.text!r} has {len(drawn)} documents for contexts of {tokens} tokens, and {contexts} are wanted; give "
                "fewer or shorter contexts, or a longer text"
            )
        return drawn

    def _cut(self, text: str, count: Count, tokens: int) -> AskedContext | None:
        """Context, the words before the answer, and the answer; `None` if the document ends before."""
        lines, left = text.splitlines(keepends=True), tokens
        size = 0
        for line in lines:
            left -= count(line)
            if left < 0:
                break
            size += len(line)
        lead = _end(text, size + LEAD)
        stop = _end(text, lead + self.characters)
        if left >= 0 or not size or stop - lead < self.characters // 2:
            return None
        return AskedContext(text[:size].rstrip("\n"), (Question("\n" + text[size:lead], text[lead:stop]),))


def _end(text: str, position: int) -> int:
    """The first space or end of a line from `position` on."""
    while position < len(text) and not text[position].isspace():
        position += 1
    return min(position, len(text))

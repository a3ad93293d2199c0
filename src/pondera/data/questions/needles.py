"""Needles: short facts at random depths of a long text, and a question about each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

from pondera.core.errors import UserError
from pondera.data.questions.base import AskedContext, Count, Question, Questions
from pondera.data.questions.common.prose import fill, paragraphs

PLACES = (
    *("harbour office", "north gate", "old library", "radio tower", "grain store", "boat house", "city archive"),
    *("glass factory", "river station", "stone bridge", "wine cellar", "music school", "post office", "water mill"),
    *("paper mill", "east wing", "power plant", "town hall", "salt mine", "tea house", "ferry dock", "print shop"),
    *("clock tower", "fish market", "brick works", "seed bank", "sail loft", "apple barn", "coal yard", "bell room"),
    *("map room", "tram depot"),
)


class Needles(Questions):
    """Facts of the form "The access code of the harbour office is 4831." between the paragraphs of a text.

    The usual needle test with several needles: each is asked alone, after the cache was compressed. Codes and places differ
    between contexts.

    Args:
        needles: how many facts a context has.
        text: the text around them, as ``data.text``; of the standard library the language reference is taken.
        digits: of a code.

    Example:
        >>> asked = Needles(needles=2).draw(lambda text: len(text) // 4, tokens=400, contexts=1, seed=0)[0]
        >>> all(question.answer.strip() in asked.context for question in asked.questions)
        True
    """

    examples: ClassVar[dict[str, str]] = {"default": "Needles()", "passkey": "Needles(needles=1, digits=6)"}

    def __init__(self, needles: int = 8, text: str = "stdlib", digits: int = 4) -> None:
        if not 1 <= needles <= len(PLACES):
            raise UserError(f"needles={needles}: give 1 to {len(PLACES)}")
        if not 1 <= digits <= 12:
            raise UserError(f"digits={digits}: give 1 to 12")
        self.needles, self.text, self.digits = needles, text, digits

    def draw(self, count: Count, tokens: int, contexts: int, seed: int) -> list[AskedContext]:
        """See `Questions.draw`."""
        rng = random.Random(f"needles {seed}")
        found = paragraphs(self.text, rng)
        return [self._context(rng, count, tokens, found) for _ in range(contexts)]

    def _context(self, rng: random.Random, count: Count, tokens: int, found: Iterator[str]) -> AskedContext:
        codes = {place: "".join(rng.choices("0123456789", k=self.digits)) for place in rng.sample(PLACES, self.needles)}
        facts = [f"The access code of the {place} is {code}." for place, code in codes.items()]
        room = tokens - sum(count(fact + "\n\n") for fact in facts)
        if room < tokens // 4:
            raise UserError(
                f"{self!r}: {self.needles} needles do not fit into {tokens} tokens; give fewer or longer contexts"
            )
        lines = fill(found, count, room, self.text)
        for fact in facts:
            lines.insert(rng.randint(0, len(lines)), fact)
        asked = (
            Question(
                f"\n\nQuestion: What is the access code of the {place}?\nAnswer: The access code of the {place} is",
                f" {code}",
            )
            for place, code in codes.items()
        )
        return AskedContext("\n\n".join(lines), tuple(asked))

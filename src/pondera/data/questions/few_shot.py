"""FewShot: the label of a word that was seen in a long list of examples."""

from __future__ import annotations

import random
from itertools import product
from typing import ClassVar

from pondera.core.errors import UserError
from pondera.data.questions.base import AskedContext, Count, Question, Questions

FIRST = ("br", "cl", "dr", "fl", "gr", "k", "l", "m", "n", "p", "qu", "r", "st", "t", "v", "z")
MIDDLE = ("a", "e", "i", "o", "u", "ai", "ou")
LAST = ("b", "ck", "d", "ft", "g", "lm", "n", "nt", "p", "rk", "sk", "t", "x")
LABELS = ("red", "blue", "green", "white", "black", "gold")


class FewShot(Questions):
    """Invented words with labels, one example per line, and then one of the words again.

    What a prompt with many examples asks of a cache: every line may matter, and none is more typical than another. A guess is
    right in one of six cases.

    Args:
        asked: how many of the words are asked.

    Example:
        >>> one = FewShot(asked=1).draw(lambda text: len(text) // 3, tokens=200, contexts=1, seed=0)[0]
        >>> (one.questions[0].text + one.questions[0].answer).strip() in one.context
        True
    """

    examples: ClassVar[dict[str, str]] = {"default": "FewShot()"}

    def __init__(self, asked: int = 8) -> None:
        if asked < 1:
            raise UserError(f"asked={asked}: give 1 or more")
        self.asked = asked

    def draw(self, count: Count, tokens: int, contexts: int, seed: int) -> list[AskedContext]:
        """See `Questions.draw`."""
        rng = random.Random(f"few shot {seed}")
        words = ["".join(parts) for parts in product(FIRST, MIDDLE, LAST, ("o", "a"))]
        drawn = []
        for _ in range(contexts):
            rng.shuffle(words)
            lines, left = [], tokens
            for word in words:
                line = f"Word: {word} Colour: {rng.choice(LABELS)}"
                size = count(line + "\n")
                if size > left:
                    break
                lines.append(line)
                left -= size
            if len(lines) < 2 * self.asked:
                raise UserError(
                    f"{self!r}: {tokens} tokens hold {len(lines)} examples; ask fewer or give longer contexts"
                )
            asked = (line.rpartition(" ") for line in rng.sample(lines, self.asked))
            drawn.append(
                AskedContext("\n".join(lines), tuple(Question(f"\n{begin}", f" {label}") for begin, _, label in asked))
            )
        return drawn

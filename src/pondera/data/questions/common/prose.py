"""Text to fill contexts with, as paragraphs in an order that is drawn."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pondera.core.errors import UserError
from pondera.data.questions.base import Count
from pondera.data.text import open_text

REFERENCE = "topics/"
"""The documents of the standard library that are prose: the language reference."""


def paragraphs(text: str, rng: random.Random) -> Iterator[str]:
    """The paragraphs of a source, its documents in an order that is drawn.

    Args:
        text: as ``data.text``; of ``"stdlib"`` only the language reference is taken.
        rng: draws the order.
    """
    source = open_text(text)
    documents = [d.text for d in source.read() if text != "stdlib" or d.name.startswith(REFERENCE)]
    rng.shuffle(documents)
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            if paragraph.strip():
                yield paragraph.strip("\n")


def fill(found: Iterator[str], count: Count, tokens: int, name: str) -> list[str]:
    """Takes whole paragraphs until the next one would exceed the length; a paragraph longer than the rest is left out.

    Args:
        found: paragraphs, which are used up.
        count: counts tokens.
        tokens: the length at most.
        name: the source, for the message.

    Raises:
        UserError: the text ends before half of the length.
    """
    taken, left = [], tokens
    for paragraph in found:
        size = count(paragraph + "\n\n")
        if size <= left:
            taken.append(paragraph)
            left -= size
        if left < tokens // 20:
            return taken
    if left > tokens // 2:
        raise UserError(
            f"{name!r} has too little text for contexts of {tokens} tokens; give a longer text or shorter contexts"
        )
    return taken

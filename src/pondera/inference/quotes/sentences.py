"""Cuts a text into passages and sentences by rules, without a model.

A sentence ends at a mark of punctuation and white space, at a blank line, or before a line of a list, a table or a heading. A
passage has consecutive sentences of one file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 600
"""Characters of a sentence at most; longer ones (code, text without punctuation) are cut at white space."""
PASSAGE, SHORTEST = 1000, 400
"""Characters of a passage at most, and from where on a blank line ends it."""

_BLANK = r"\n[ \t\r]*\n\s*"
_LINE = r"\n(?=[ \t]*(?:[-*+•>|#]|\d+[.)])[ \t])"
_MARK = r"(?:(?<=[.!?…])|(?<=[.!?…][\"”’»)\]]))\s+(?=[^\sa-z])"
_WIDE = r"(?:(?<=[。！？])|(?<=[。！？][”』」）]))(?![”』」）])\s*"
_GAP = re.compile(f"(?P<blank>{_BLANK})|{_LINE}|(?P<mark>{_MARK})|{_WIDE}")
_SHORT = re.compile(r"(?:^|[\s(\"“])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|No|Fig|Eq|cf|e\.g|i\.e|etc|approx|al)\.$")


def sentences(text: str) -> list[tuple[int, int, bool]]:
    """The sentences of a text: first character, end, and whether a blank line comes before.

    Example:
        >>> text = "Dr. Ada Lovelace wrote it. It ran!\\n\\n- one\\n- two"
        >>> [text[start:end] for start, end, _ in sentences(text)]
        ['Dr. Ada Lovelace wrote it.', 'It ran!', '- one', '- two']
    """
    found, start, after_blank = [], 0, False
    for gap in _GAP.finditer(text):
        if gap["mark"] is not None and _SHORT.search(text, max(0, gap.start() - 12), gap.start()):
            continue
        found += [(*piece, after_blank and not number) for number, piece in enumerate(_cut(text, start, gap.start()))]
        after_blank = gap["blank"] is not None
        start = gap.end()
    return found + [(*piece, after_blank and not number) for number, piece in enumerate(_cut(text, start, len(text)))]


def passages(found: list[tuple[int, int, bool]]) -> list[int]:
    """The number of the passage of each sentence.

    Args:
        found: the sentences of one text.

    Example:
        >>> passages([(0, 500, False), (502, 900, True), (901, 1300, False)])
        [0, 1, 1]
    """
    numbers, number, first = [], 0, 0
    for place, (start, end, after_blank) in enumerate(found):
        if place and (end - first > PASSAGE or (after_blank and found[place - 1][1] - first >= SHORTEST)):
            number += 1
        if not numbers or number != numbers[-1]:
            first = start
        numbers.append(number)
    return numbers


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The range without white space at its ends, in pieces of at most `LONGEST` characters."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip("\ufeff \t\r\n\f\v\u3000"))
    end = start + len(text[start:end].rstrip())
    while end - start > LONGEST:
        window = text[start : start + LONGEST]
        space = window.rfind("\n", LONGEST // 2)
        space = window.rfind(" ") if space < 0 else space
        stop = start + (space if space > 0 else LONGEST)
        yield start, start + len(text[start:stop].rstrip())
        start = stop + len(text[stop:end]) - len(text[stop:end].lstrip())
    if end > start:
        yield start, end

"""Text that is shown as it is, whatever it holds: characters that would act on a terminal or a page are written out."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (text direction), lone surrogates, line separators
JOINERS = "\u200c\u200d"  # formats that only shape the letters beside them


def escape(token: str) -> str:
    """The token with every character that would act instead of show written out; a line end shows and ends the line.

    Example:
        >>> escape("a\\x1b[2J\\n")
        'a\\\\x1b[2J↵\\n'
    """
    return "".join("↵\n" if character == "\n" else _visible(character) for character in token)


def escape_lines(text: str) -> str:
    """The same for a text whose lines end as lines do.

    Example:
        >>> escape_lines("a\\x1b[2J\\nb")
        'a\\\\x1b[2J\\nb'
    """
    return "\n".join(map(escape, text.split("\n")))


def _visible(character: str) -> str:
    if character == "\t" or character in JOINERS or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode()

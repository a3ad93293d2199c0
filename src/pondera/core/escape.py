"""Escapes control characters, so that untrusted text can be printed to a terminal or a page."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats (text direction), lone surrogates, line separators
JOINERS = "\u200c\u200d"  # formats that only change the shape of adjacent letters


def escape(token: str) -> str:
    """Escapes the control characters of a token; a line end is shown as ``↵`` and kept.

    Example:
        >>> escape("a\\x1b[2J\\n")
        'a\\\\x1b[2J↵\\n'
    """
    return "".join("↵\n" if character == "\n" else _visible(character) for character in token)


def escape_lines(text: str) -> str:
    """Escapes the control characters of a text; line ends are kept.

    Example:
        >>> escape_lines("a\\x1b[2J\\nb")
        'a\\\\x1b[2J\\nb'
    """
    return "\n".join(map(escape, text.split("\n")))


def _visible(character: str) -> str:
    if character == "\t" or character in JOINERS or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode()

"""Exceptions that end a command: wrong input, a failure at run time, an interruption."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input of the user is invalid; the message says what to type instead.

    The command line prints the message without a traceback and exits with code 2.

    Example:
        >>> raise UserError("data.text: no such file: 'bokos'")
        Traceback (most recent call last):
        pondera.core.errors.UserError: data.text: no such file: 'bokos'
    """


class Failure(RuntimeError):
    """The command failed at run time, e.g. because the disk is full or the loss is NaN.

    The command line prints the message without a traceback and exits with code 1.
    """


class Interrupted(Exception):
    """The user or the system interrupted the command after its state was saved; the message says how to resume.

    The command line prints the message and exits with code 130.
    """


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """A `UserError` for an unknown name that suggests the nearest known names.

    Args:
        kind: what the name stands for, e.g. ``"recipe"``.
        given: the unknown name.
        allowed: all known names.

    Example:
        >>> print(unknown("recipe", "ponderml2", ["plain", "ponderlm2"]))
        unknown recipe 'ponderml2'; did you mean 'ponderlm2'? (allowed: plain, ponderlm2)
    """
    names = sorted(allowed)
    folded = {name.lower(): name for name in names}
    near = [folded[match] for match in difflib.get_close_matches(given.lower(), folded, n=2, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    listing = ", ".join(names) if names else "there are none yet"
    return UserError(f"unknown {kind} {given!r}{hint} (allowed: {listing})")


def described(error: Exception) -> str:
    """An error of somebody else's code in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"

"""The seam `think/`: how much to compute for each token."""

from __future__ import annotations

from typing import ClassVar

from pondera.models.method import Method, MethodOutput

__all__ = ["Think", "MethodOutput"]


class Think(Method):
    """Decides how many passes each token gets, and runs them.

    What it has to keep is the promise of `Method`; the contract tests check every file of this folder.
    """

    interleaved: ClassVar[bool] = False
    """Slots of a token stand next to each other in causal order, so sliding windows must grow with their number."""

    adaptive: bool = False
    """Tokens take different numbers of passes, so that prices have to be told how many each took."""

    packed: bool = True
    """Passes that only some tokens take are run for those alone; false runs all rows and masks, the slow twin for tests."""

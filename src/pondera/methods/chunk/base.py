"""The seam `segment/`: how much to say at once."""

from __future__ import annotations

from pondera.models.method import Method, MethodOutput

__all__ = ["Chunk", "MethodOutput"]


class Chunk(Method):
    """Decides in which portions, larger than a token, a text is read and predicted.

    The model stays one of tokens for whoever uses it: a state per token enters the head, and a cache counts tokens. What
    it has to keep is the promise of `Method`; the contract tests check every file of this folder.
    """

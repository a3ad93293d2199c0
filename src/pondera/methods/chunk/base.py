"""Base class of chunk methods, which read and predict units larger than a token."""

from __future__ import annotations

from pondera.models.method import Method, MethodOutput, TokenBatch

__all__ = ["Chunk", "MethodOutput", "TokenBatch"]


class Chunk(Method):
    """Base class of methods that process a sequence in units larger than a token.

    For its users the model remains a token model: the head receives one state per token, and a cache counts tokens. A
    chunk method must satisfy the contract of `Method`. The contract tests check every file of this folder.
    """

"""The operations of a method for some tokens of one sequence; `pondera.cost.model.CostModel` computes their cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DecoderPass:
    """One call of the decoder stack, or of additional layers of the same kind, for one sequence.

    Args:
        queries: number of input rows (KV slots).
        keys: keys per query, including the new ones.
        cached: a cache has earlier rows; a linear-attention layer then runs its recurrent step if ``queries == 1``.
        repeats: number of such calls; a fraction if the number is random and this is its mean.
        wider: additional coordinates of the queries, keys and values of every head.
        layers: number of layers, each at the mean cost of the stack; default: `None`, the whole stack.
    """

    queries: float
    keys: float
    cached: bool = False
    repeats: float = 1
    wider: int = field(default=0, repr=False)
    layers: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MatMul:
    """A matrix product of a method outside of the decoder stack, for one sequence.

    Args:
        rows: number of rows; may be a fraction as in `DecoderPass`.
        weights: number of entries of the matrix; ``"head"`` for the output head or the embedding table, which have one size.
        trained: false if no gradient flows through the product, or only through a few of its results.
    """

    rows: float
    weights: int | Literal["head"]
    trained: bool = True


@dataclass(frozen=True)
class CostSchedule:
    """The operations of a method for some tokens of one sequence.

    Args:
        calls: passes through the decoder stack, and further matrix products of the method.
        head_rows: rows through the output head.
        tokens: number of processed tokens, for the cost per token.
    """

    calls: tuple[DecoderPass | MatMul, ...]
    head_rows: int
    tokens: int

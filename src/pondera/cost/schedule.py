"""What a method runs for some tokens of one sequence, as `pondera.cost.model.CostModel` prices it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DecoderPass:
    """One call of the decoder stack, or of further layers that are like its own, for one sequence.

    Args:
        queries: rows (slots) that run.
        keys: rows each attention query is scored against, including the new ones.
        cached: a cache held earlier rows; a linear-attention layer then takes the recurrent step when ``queries == 1``.
        repeats: how many times it is made; a fraction where the number is random and this is its mean.
        wider: coordinates that queries, keys and values of every head have beyond the architecture's own.
        layers: how many layers run, each at the mean price of the stack's; none: the stack.
    """

    queries: float
    keys: float
    cached: bool = False
    repeats: float = 1
    wider: int = field(default=0, repr=False)
    layers: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MatMul:
    """Rows that a method multiplies with a matrix outside of the decoder stack, for one sequence.

    Args:
        rows: how many, fractions as in `DecoderPass`.
        weights: entries of the matrix; ``"head"``: of the output head or the embedding table, which are of one size.
        trained: false where no gradient goes through it, or only through a few of its results.
    """

    rows: float
    weights: int | Literal["head"]
    trained: bool = True


@dataclass(frozen=True)
class CostSchedule:
    """What a method does to process some tokens of one sequence.

    Args:
        calls: every pass through the decoder stack, and what the method multiplies beside it.
        head_rows: rows through the output head, for the prediction.
        tokens: tokens processed, so that a price can be given per token.
    """

    calls: tuple[DecoderPass | MatMul, ...]
    head_rows: int
    tokens: int

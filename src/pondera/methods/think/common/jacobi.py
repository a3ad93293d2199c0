"""Jacobi iteration: latent thoughts that depend on those of earlier tokens, refined for all tokens at once.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def jacobi(
    run: Callable[[list[Tensor]], list[Tensor]],
    h_BTD: Tensor,
    thoughts: int,
    rounds: int,
    feed: Callable[[Tensor], Tensor],
    residuals: list[float] | None = None,
) -> list[Tensor]:
    """Input vectors of all slots: a first guess, stage by stage, then `rounds` refinements.

    Because of causality each round makes at least one more thought, in interleaved order, exact; gradient flows
    everywhere.

    Args:
        run: one pass: from the inputs of each stage to its states.
        h_BTD: token embeddings, the inputs of stage 0.
        thoughts: K, further stages.
        rounds: refinements.
        feed: from a state to the next stage's input.
        residuals: the largest change of each round is appended to it.

    Returns:
        ``K + 1`` tensors ``[B, T, D]``.

    Source: PonderLM-2, arXiv 2509.23184, as coded by its authors. Cost: K(K+1)/2 + R(K+1) passes of T rows.
    """
    stages = [h_BTD]
    for _ in range(thoughts):
        stages = [h_BTD, *map(feed, run(stages))]
    for _ in range(rounds if thoughts else 0):
        refined = [h_BTD, *map(feed, run(stages)[:-1])]
        if residuals is not None:
            pairs = zip(refined[1:], stages[1:], strict=True)
            residuals.append(max((new - old).detach().abs().max().item() for new, old in pairs))
        stages = refined
    return stages

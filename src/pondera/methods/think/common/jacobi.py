"""Jacobi iteration for latent thoughts that depend on the thoughts of earlier tokens, in parallel over tokens.

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
    """Computes the input vectors of all slots: an initial guess, stage by stage, then `rounds` refinements.

    The order is causal, so each round makes at least one more thought exact, in interleaved order. Gradients flow
    through all rounds.

    Args:
        run: one pass, from the inputs of each stage to its states.
        h_BTD: token embeddings, the inputs of stage 0.
        thoughts: K, the number of further stages.
        rounds: number of refinements.
        feed: maps a state to the input of the next stage.
        residuals: if given, the function appends the largest change of each round to it.

    Returns:
        ``K + 1`` tensors ``[B, T, D]``.

    Source: PonderLM-2, arXiv 2509.23184, following the authors' code. Cost: K(K+1)/2 + R(K+1) passes over T tokens.
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

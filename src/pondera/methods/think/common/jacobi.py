"""Jacobi iteration for latent thoughts that depend on the thoughts of earlier tokens, in parallel over tokens.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from pondera.core.errors import UserError


@dataclass(frozen=True)
class Rounds:
    """How long to refine.

    Args:
        most: the largest number of rounds.
        tolerance: a batch row is not refined further once no value of it changes by more than this, relative to the RMS of
            its embeddings; 0: every row takes all rounds.
    """

    most: int
    tolerance: float = 0.0


MOST_ROUNDS, TOLERANCE = 64, 1e-3
"""The limits of ``eval_rounds="converged"``."""
PRICED_ROUNDS = 8.0
"""The rounds of ``eval_rounds="converged"`` in cost estimates; the measured number depends on weights and text."""


def check_rounds(eval_rounds: int | str) -> None:
    """Checks the setting of a method.

    Raises:
        UserError: it is neither a number of rounds nor ``"converged"`` or ``"exact"``.
    """
    if eval_rounds not in ("converged", "exact") and not (isinstance(eval_rounds, int) and eval_rounds >= 0):
        raise UserError(f"eval_rounds={eval_rounds!r}: give a number of rounds, 'converged' or 'exact'")


def rounds_of(eval_rounds: int | str, unknowns: int) -> Rounds:
    """The rounds of a setting; as many rounds as there are unknown thoughts in a sequence are exact.

    Args:
        eval_rounds: a number, ``"converged"``, or ``"exact"``.
        unknowns: T K.
    """
    if eval_rounds == "exact":
        return Rounds(unknowns)
    return Rounds(min(MOST_ROUNDS, unknowns), TOLERANCE) if eval_rounds == "converged" else Rounds(int(eval_rounds))


def priced_rounds(eval_rounds: int | str) -> float:
    """The number of rounds in cost estimates."""
    return PRICED_ROUNDS if eval_rounds == "converged" else float(eval_rounds)


def jacobi(
    run: Callable[[list[Tensor]], list[Tensor]],
    h_BTD: Tensor,
    thoughts: int,
    rounds: Rounds,
    feed: Callable[[Tensor], Tensor],
    residuals: list[float] | None = None,
    real_BT: Tensor | None = None,
) -> list[Tensor]:
    """Computes the input vectors of all slots: an initial guess, stage by stage, then refinements.

    The order is causal, so each round makes at least one more thought exact, in interleaved order: T K rounds are exact.
    Gradients flow through all rounds. Each batch row decides for itself when it has converged, so a row does not depend on
    the others.

    Args:
        run: one pass, from the inputs of each stage to its states.
        h_BTD: token embeddings, the inputs of stage 0.
        thoughts: K, the number of further stages.
        rounds: the number of refinements.
        feed: maps a state to the input of the next stage.
        residuals: if given, the function appends the largest change of each round to it.
        real_BT: false for padding, whose changes are ignored; default: `None`, no padding.

    Returns:
        ``K + 1`` tensors ``[B, T, D]``.

    Source: PonderLM-2, arXiv 2509.23184, following the authors' code; the tolerance is ours. Cost: K(K+1)/2 + R(K+1) passes
    over T tokens.
    """
    stages = [h_BTD]
    for _ in range(thoughts):
        stages = [h_BTD, *map(feed, run(stages))]
    done_B, scale_B = None, h_BTD.detach().float().square().mean((1, 2)).sqrt()
    for _ in range(rounds.most if thoughts else 0):
        refined = [h_BTD, *map(feed, run(stages)[:-1])]
        if done_B is not None:
            refined = [torch.where(done_B[:, None, None], old, new) for old, new in zip(stages, refined, strict=True)]
        if residuals is not None or rounds.tolerance:
            change_B = _largest_change(stages, refined, real_BT)
            if residuals is not None:
                residuals.append(change_B.max().item())
        stages = refined
        if rounds.tolerance:
            done_B = change_B <= rounds.tolerance * scale_B
            if _everywhere(done_B):
                break
    return stages


def _largest_change(old: list[Tensor], new: list[Tensor], real_BT: Tensor | None) -> Tensor:
    """``[B]``: the largest change of any value, padding ignored."""
    changes_BT = torch.stack([(a - b).detach().abs().amax(-1) for a, b in zip(old[1:], new[1:], strict=True)]).amax(0)
    return (changes_BT if real_BT is None else changes_BT.where(real_BT, 0)).amax(-1).float()


def _everywhere(done_B: Tensor) -> bool:
    """Whether all rows have converged, on all processes: those with sharded weights must run the same passes."""
    open_rows = (~done_B).sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(open_rows)
    return open_rows.item() == 0

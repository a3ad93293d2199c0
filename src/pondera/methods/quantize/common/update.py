"""Codebook update rules: losses for gradients; statistics for moving averages and respawn.

Shapes: N vectors, K codes, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from pondera.core.loss_terms import LossTerm
from pondera.methods.quantize.common.nearest import cluster_sums
from pondera.methods.quantize.common.ranks import gathered, num_ranks, summed

UPDATES = ("gradient", "ema", "none")
SMOOTHING = 1e-5


def losses(
    x: Tensor,
    q: Tensor,
    commitment: float = 0.25,
    detach_input: bool = False,
    detach_target: bool = True,
    moves_codes: bool = True,
) -> dict[str, LossTerm]:
    """The codebook and commitment losses: squared distances between vectors and their codes, as sums and counts.

    ``"codebook"`` moves codes to vectors, ``|q - sg(x)|^2``; ``"commitment"`` moves vectors to codes, ``|x -
    sg(q)|^2``.

    Args:
        x: ``[..., C]``, the vectors.
        q: ``[..., C]``, the quantized vectors, with gradient to the codebook.
        commitment: weight of the second term (beta).
        detach_input: if true, neither term gives the vectors a gradient.
        detach_target: if true, each term moves only its own side; false drops both stop-gradients.
        moves_codes: if false, drops the term ``"codebook"``.

    Source: van den Oord et al., arXiv 1711.00937, equation 3.
    Resolved: means are over elements, not vectors, as in public code; papers sum over elements.

    Example:
        >>> terms = losses(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        >>> [(name, float(term.mean()), term.weight) for name, term in terms.items()]
        [('codebook', 2.0, 1.0), ('commitment', 2.0, 0.25)]
    """
    x = x.detach() if detach_input else x
    x_target, q_target = (x.detach(), q.detach()) if detach_target else (x, q)
    terms = {"codebook": LossTerm(mse_loss(q, x_target, reduction="sum"), q.numel())} if moves_codes else {}
    return terms | {"commitment": LossTerm(mse_loss(x, q_target, reduction="sum"), q.numel(), commitment)}


class Statistics(nn.Module):
    """Codebook statistics: moving averages of code hits and, for EMA, of vectors; and vectors to respawn dead codes.

    The statistics collect the vectors of a step and change the codebook at the end of the step. All micro-batches
    therefore see the same codes, and splitting a batch changes nothing. All values are summed or gathered over ranks
    immediately, so all ranks have the same buffers and make the same decisions without further communication.

    Source: EMA: van den Oord et al., arXiv 1711.00937, appendix A.1, and the smoothing of the authors' public code.
    Respawn: arXiv 2605.06870's public code and others.
    Cost: per batch, one sum over ranks of ``K`` numbers (EMA: ``K (C + 1)``) and, for respawn, a gather of K vectors;
    memory for twice as many numbers.
    Resolved: averages are of hits per step. Respawned codes start with the average number of hits, so they are not dead
    immediately. Without EMA, the optimizer state of a respawned row does not change.

    Args:
        rows_KC: the initial codebook; each row counts as one hit of itself.
        decay: decay of the moving averages.
        ema: if true, a row is the average of the vectors that hit it.
        respawn: a code with fewer hits per step is dead, and a vector of the step replaces it; 0: never.
    """

    hits_K: Tensor
    new_hits_K: Tensor
    sums_KC: Tensor
    new_sums_KC: Tensor
    spares_KC: Tensor
    num_spares: Tensor

    def __init__(self, rows_KC: Tensor, decay: float, ema: bool, respawn: float) -> None:
        super().__init__()
        self.decay, self.ema, self.respawn = decay, ema, respawn
        rows_KC = rows_KC.detach().float()
        self.register_buffer("hits_K", rows_KC.new_ones(len(rows_KC)))
        self.register_buffer("new_hits_K", rows_KC.new_zeros(len(rows_KC)))
        if ema:
            self.register_buffer("sums_KC", rows_KC.clone())
            self.register_buffer("new_sums_KC", torch.zeros_like(rows_KC))
        if respawn:
            self.register_buffer("spares_KC", torch.zeros_like(rows_KC))
            self.register_buffer("num_spares", torch.zeros((), dtype=torch.long, device=rows_KC.device))

    @torch.no_grad()
    def gather(self, x_NC: Tensor, codes_N: Tensor, generator: torch.Generator) -> None:
        """Adds the vectors of a batch and their codes to the statistics."""
        if self.ema:
            sums_KC, hits_K = cluster_sums(x_NC, codes_N, len(self.hits_K))
            self.new_sums_KC += summed(sums_KC.to(self.hits_K))
        else:
            hits_K = torch.bincount(codes_N, minlength=len(self.hits_K))
        self.new_hits_K += summed(hits_K.to(self.hits_K))
        if self.respawn:
            share = -(-len(self.hits_K) // num_ranks())
            drawn = torch.randperm(len(x_NC), generator=generator)[:share]
            spares = gathered(x_NC[drawn.to(x_NC.device)].to(self.hits_K))[: len(self.hits_K)]
            if len(spares):
                self.spares_KC[: len(spares)] = spares
                self.num_spares.fill_(len(spares))

    @torch.no_grad()
    def settle(self, rows_KC: Tensor) -> None:
        """Ends a step: updates the averages and, in place, the rows. Does nothing after a step without vectors."""
        total = self.new_hits_K.sum()
        if not total:
            return
        self.hits_K.lerp_(self.new_hits_K, 1 - self.decay)
        self.new_hits_K.zero_()
        if self.ema:
            self.sums_KC.lerp_(self.new_sums_KC, 1 - self.decay)
            self.new_sums_KC.zero_()
            mass, K = self.hits_K.sum(), len(self.hits_K)
            smooth_K = (self.hits_K + SMOOTHING) / (mass + K * SMOOTHING) * mass
            rows_KC.copy_(self.sums_KC / smooth_K[:, None])
        if self.respawn:
            dead = (self.hits_K < self.respawn).nonzero()[: int(self.num_spares), 0]
            rows_KC[dead] = self.spares_KC[: len(dead)].to(rows_KC)
            self._count(dead, rows_KC[dead], (total / len(self.hits_K)).expand(len(dead)))

    @torch.no_grad()
    def seed(self, rows_KC: Tensor, hits_K: Tensor) -> None:
        """Starts from rows that were computed from data.

        Args:
            rows_KC: the rows.
            hits_K: number of vectors per step that hit each row.
        """
        self._count(torch.arange(len(hits_K), device=hits_K.device), rows_KC, hits_K)

    def _count(self, codes: Tensor, rows_KC: Tensor, hits_K: Tensor) -> None:
        self.hits_K[codes] = hits_K.to(self.hits_K)
        if self.ema:
            self.sums_KC[codes] = (rows_KC * hits_K[:, None]).to(self.sums_KC)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the module, but stays in float32; 16 bits cannot represent an average that changes by 1 %."""
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

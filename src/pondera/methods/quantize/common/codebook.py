"""One codebook: the nearest of K rows stands for a vector. Where the rows are from is the quantizer's own affair.

Shapes: N vectors, K codes, C = D width; there is one group and one level.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.methods.quantize.base import ABSENT, Quantized, Quantizer
from pondera.methods.quantize.common.estimator import ESTIMATORS, estimate
from pondera.methods.quantize.common.finite import FiniteVectors
from pondera.methods.quantize.common.nearest import nearest
from pondera.methods.quantize.common.update import Statistics, losses
from pondera.methods.quantize.common.warm_up import KEPT_PER_CODE, WarmUp


class Codebook(Quantizer):
    """What codebooks of every parametrisation share: nearest row, warm-up, losses, statistics, estimator.

    Everything is computed in float32 at least, autocast or not, so that training and inference choose the same codes.
    A step begins with `begin_step`; where nobody calls it, with every call in training mode.

    Args:
        codes: K.
        start_step: the first optimizer step that quantizes; before it the input passes through, with codes `ABSENT` and
            without terms.
        estimator: what gradient the input gets for the output's: ``"straight_through"``, ``"rotation"``, ``"none"``.
        commitment: weight of the term that moves vectors to codes.
        detach_input: the vectors get no gradient from the terms.
        detach_target: false drops the stop-gradients of both terms, so that each moves vectors and codes.
    """

    gate: WarmUp
    step: Tensor
    learns: bool = True
    """Rows get gradient; false leaves out the term that would move them."""

    def __init__(
        self,
        codes: int,
        start_step: int,
        estimator: str,
        commitment: float,
        detach_input: bool,
        detach_target: bool,
    ) -> None:
        super().__init__()
        if isinstance(codes, bool) or not isinstance(codes, int) or codes < 1:
            raise UserError(f"codes={codes!r}: give how many codes the codebook has, 1 or more")
        if start_step < 0:
            raise UserError(f"start_step={start_step}: give the first step that quantizes, 0 or more")
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        if commitment < 0:
            raise UserError(f"commitment={commitment}: give the weight of a term, 0 or more")
        self.codes, self.start_step, self.estimator = codes, start_step, estimator
        self.commitment, self.detach_input, self.detach_target = commitment, detach_input, detach_target
        self.statistics: Statistics | None = None
        self._finite = FiniteVectors()
        self._told, self._seed = False, 0

    @abstractmethod
    def rows(self) -> Tensor:
        """``[K, C]``: the codebook, with gradient to what it is made of."""

    @abstractmethod
    def start_from(self, x_MC: Tensor, generator: torch.Generator, per_step: int) -> None:
        """Makes the codebook from vectors, when the gate opens.

        Args:
            x_MC: vectors, the same on every rank.
            generator: for draws, the same on every rank.
            per_step: vectors of a batch of all ranks.
        """

    def _make_gate(self, from_vectors: bool) -> None:
        """The warm-up of `start_step`; `from_vectors` has it wait for vectors that `start_from` wants."""
        self.gate = WarmUp(self.start_step, KEPT_PER_CODE * self.codes if from_vectors else 0, self.dim)
        self.register_buffer("step", torch.tensor(-1))

    @property
    def sizes(self) -> Tensor:
        """``[1, 1]``: K."""
        return torch.tensor([[self.codes]])

    def table(self) -> Tensor:
        """``[1, 1, K, C]``; see `Quantizer.table`."""
        with torch.autocast(self.gate.is_open.device.type, enabled=False):
            return self.rows()[None, None]

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        x_NC, kept_N = self._flat(x, mask, levels)
        if self.gate.closed:
            return torch.full((*x.shape[:-1], 1, 1), ABSENT, device=x.device)
        found_N = nearest(chosen(x_NC, kept_N), self.table()[0, 0])
        return scatter_rows(found_N, kept_N, len(x_NC)).view(*x.shape[:-1], 1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        self._built()
        if codes.ndim < 2 or codes.shape[-2] != 1 or codes.shape[-1] > 1:
            raise UserError(f"codes of shape {tuple(codes.shape)} for one codebook: they are [..., 1, 1]")
        rows = F.embedding(codes.clamp(min=0), self.table()[0, 0])
        return self._join(torch.where(codes[..., None] == ABSENT, 0, rows).sum(-2))

    def forward(self, x: Tensor, mask: Tensor | None = None, levels: int | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        x_NC, kept_N = self._flat(x, mask, levels)
        vectors_NC = _wide(chosen(x_NC, kept_N))
        usable_N = self._usable(vectors_NC.detach())
        if self.training:
            self._warm_up(chosen(vectors_NC.detach(), usable_N))
        table_KC = self.table()[0, 0]
        if self.gate.closed:
            # Processes that average gradients wait for those of every weight.
            out_NC, terms = x_NC + (0 * table_KC.sum()).to(x.dtype), {}
            codes_N = torch.full((len(x_NC),), ABSENT, device=x.device)
        else:
            found_N = nearest(vectors_NC, table_KC)
            if self.training and self.statistics is not None:
                usable_NC, their_codes_N = chosen(vectors_NC.detach(), usable_N), chosen(found_N, usable_N)
                self.statistics.gather(usable_NC, their_codes_N, self._generator())
            q_NC = F.embedding(found_N, table_KC.to(vectors_NC.dtype))
            terms = losses(
                vectors_NC,
                q_NC,
                commitment=self.commitment,
                detach_input=self.detach_input,
                detach_target=self.detach_target,
                moves_codes=self.learns,
            )
            out_NC = estimate(self.estimator, vectors_NC, q_NC).to(x.dtype)
            out_NC = out_NC if kept_N is None else x_NC.index_put((kept_N,), out_NC)
            codes_N = scatter_rows(found_N, kept_N, len(x_NC))
        codes = codes_N.view(*x.shape[:-1], 1, 1)
        return Quantized(out_NC.view(x.shape), codes, terms, x.detach(), table_KC.detach()[None, None])

    def begin_step(self, step: int, seed: int) -> None:
        """Ends the step before: averages and respawn change the codebook now, between steps."""
        self._told = step >= 0  # a negative step is that of no training
        if self._told:
            self._seed = seed
            self._begin(step)

    def _begin(self, step: int) -> None:
        if self.statistics is not None:
            self.statistics.settle(self.rows())
        self.step.fill_(step)

    def _warm_up(self, x_NC: Tensor) -> None:
        """What the gate does with a batch in training; it opens before the batch is quantized."""
        if not self._told:
            self._begin(int(self.step) + 1)
        if not self.gate.closed:
            return
        self.gate.keep(x_NC)
        if self.gate.is_due(int(self.step)):
            if self.gate.wants_vectors:
                self.start_from(self.gate.vectors(), self._generator(), int(self.gate.per_batch))
            self.gate.is_open.fill_(True)

    def _usable(self, x_NC: Tensor) -> Tensor | None:
        """Numbers of the vectors that a batch in training adds to what is kept of it; none: all."""
        keeps = self.statistics is not None or (self.gate.closed and self.gate.wants_vectors)
        return self._finite.of(x_NC, repr(self)) if self.training and keeps else None

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + int(self.step)) % 2**63)

    def _flat(self, x: Tensor, mask: Tensor | None, levels: int | None) -> tuple[Tensor, Tensor | None]:
        """``[N, C]``, and the numbers of those to quantize; none: all."""
        self._expect(x, mask, levels)
        return x.reshape(-1, self.dim), None if mask is None else mask.flatten().nonzero()[:, 0]


def chosen(x_NC: Tensor, kept_N: Tensor | None) -> Tensor:
    """The vectors of these numbers, or their codes; all of them where there are none."""
    return x_NC if kept_N is None else x_NC[kept_N]


def scatter_rows(codes: Tensor, kept_N: Tensor | None, total: int) -> Tensor:
    """Codes at the places of their vectors among so many, `ABSENT` elsewhere."""
    if kept_N is None:
        return codes
    return codes.new_full((total, *codes.shape[1:]), ABSENT).index_put((kept_N,), codes)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

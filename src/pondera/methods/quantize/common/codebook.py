"""Codebook: base class of quantizers that replace a vector by the nearest of K rows; subclasses define the rows.

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
    """Shared machinery of codebooks: nearest row, warm-up, losses, statistics and gradient estimator.

    All computations use at least float32, with or without autocast, so training and inference choose the same codes. A
    step starts with `begin_step`; without `begin_step`, every call in training mode is a step.

    Args:
        codes: K.
        start_step: the first optimizer step that quantizes. Before it, the input passes through, codes are `ABSENT`,
            and there are no loss terms.
        estimator: gradient estimator: ``"straight_through"``, ``"rotation"`` or ``"none"``.
        commitment: weight of the term that moves vectors towards their codes.
        detach_input: if true, the loss terms give the vectors no gradient.
        detach_target: if false, drops the stop-gradients of both terms, so each term moves vectors and codes.
    """

    gate: WarmUp
    step: Tensor
    learns: bool = True
    """True if rows get gradients; false drops the loss term that would move them."""

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
            raise UserError(f"codes={codes!r}: give the number of codes, 1 or more")
        if start_step < 0:
            raise UserError(f"start_step={start_step}: give the first step that quantizes, 0 or more")
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        if commitment < 0:
            raise UserError(f"commitment={commitment}: give the weight of the loss term, 0 or more")
        self.codes, self.start_step, self.estimator = codes, start_step, estimator
        self.commitment, self.detach_input, self.detach_target = commitment, detach_input, detach_target
        self.statistics: Statistics | None = None
        self._finite = FiniteVectors()
        self._steps_announced, self._seed = False, 0

    @abstractmethod
    def rows(self) -> Tensor:
        """``[K, C]``: the codebook, with gradient to its parameters."""

    @abstractmethod
    def start_from(self, x_MC: Tensor, generator: torch.Generator, per_step: int) -> None:
        """Initializes the codebook from vectors at the end of the warm-up.

        Args:
            x_MC: vectors, the same on every rank.
            generator: random generator, the same on every rank.
            per_step: number of vectors per batch, over all ranks.
        """

    def _make_gate(self, from_vectors: bool) -> None:
        """Creates the warm-up gate for `start_step`; `from_vectors` makes it collect vectors for `start_from`."""
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
            raise UserError(f"codes of shape {tuple(codes.shape)} for one codebook: the shape must be [..., 1, 1]")
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
            # Distributed training averages the gradients of every weight, so each one needs a gradient.
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
        """Ends the previous step: moving averages and respawn update the codebook here, between steps."""
        self._steps_announced = step >= 0  # a negative step means no training
        if self._steps_announced:
            self._seed = seed
            self._begin(step)

    def _begin(self, step: int) -> None:
        if self.statistics is not None:
            self.statistics.settle(self.rows())
        self.step.fill_(step)

    def _warm_up(self, x_NC: Tensor) -> None:
        """Updates the warm-up gate with a training batch; the gate opens before the batch is quantized."""
        if not self._steps_announced:
            self._begin(int(self.step) + 1)
        if not self.gate.closed:
            return
        self.gate.keep(x_NC)
        if self.gate.is_due(int(self.step)):
            if self.gate.wants_vectors:
                self.start_from(self.gate.vectors(), self._generator(), int(self.gate.per_batch))
            self.gate.is_open.fill_(True)

    def _usable(self, x_NC: Tensor) -> Tensor | None:
        """Indices of the vectors of a training batch that statistics may use; ``None``: all."""
        keeps = self.statistics is not None or (self.gate.closed and self.gate.wants_vectors)
        return self._finite.of(x_NC, repr(self)) if self.training and keeps else None

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + int(self.step)) % 2**63)

    def _flat(self, x: Tensor, mask: Tensor | None, levels: int | None) -> tuple[Tensor, Tensor | None]:
        """``[N, C]``, and the indices of the vectors to quantize (``None``: all)."""
        self._expect(x, mask, levels)
        return x.reshape(-1, self.dim), None if mask is None else mask.flatten().nonzero()[:, 0]


def chosen(x_NC: Tensor, kept_N: Tensor | None) -> Tensor:
    """Selects the vectors, or codes, with the given indices; ``None`` selects all."""
    return x_NC if kept_N is None else x_NC[kept_N]


def scatter_rows(codes: Tensor, kept_N: Tensor | None, total: int) -> Tensor:
    """Writes codes back to the positions of their vectors among `total` vectors, `ABSENT` elsewhere."""
    if kept_N is None:
        return codes
    return codes.new_full((total, *codes.shape[1:]), ABSENT).index_put((kept_N,), codes)


def _wide(x: Tensor) -> Tensor:
    """Converts to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

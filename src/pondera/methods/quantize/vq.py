"""Vector quantization (VQ-VAE): a learned codebook, trained by gradients or by moving averages.

Shapes: K codes, C = D width, M vectors used to initialize a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.methods.quantize.common.codebook import Codebook
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.common.update import UPDATES, Statistics

INITS = ("random", "kmeans")


class VQ(Codebook):
    """Replaces a vector by the nearest of K free codebook rows.

    Source: van den Oord et al., Neural Discrete Representation Learning, arXiv 1711.00937.
    Cost: K C multiplications per vector to encode. Memory: K C numbers; with EMA three times that, with respawn once
    more; with k-means also the vectors for initialization, 32 per code. `fold` keeps only the K C numbers.
    When not to use it: with more than a few thousand codes, because most of them die; `SimVQ` moves all rows together.
    If the rows have another scale than the vectors (``init="random"``), nearly all vectors get the same code.
    Resolved: see `pondera.methods.quantize.common.update` for losses, averages and respawn, and
    `pondera.methods.quantize.common.warm_up` for the warm-up. With ``init="kmeans"`` and no warm-up the first batch in
    training mode initializes the codebook; until then the input passes through.

    Args:
        codes: K.
        update: how rows are updated: ``"gradient"`` of the losses, ``"ema"`` (moving averages), ``"none"``.
        init: ``"random"`` rows; ``"kmeans"``: centers of the vectors seen before the first quantizing step; or the rows
            themselves, ``[K, C]``.
        scale: standard deviation of random rows.
        start_step: the first optimizer step that quantizes. Before it, the input passes through, codes are `ABSENT`,
            and there are no loss terms.
        estimator: gradient estimator: ``"straight_through"``, ``"rotation"`` or ``"none"``.
        commitment: weight of the term that moves vectors towards their codes.
        detach_input: if true, the loss terms give the vectors no gradient.
        detach_target: if false, drops the stop-gradients of both terms, so each term moves vectors and codes.
        respawn: a code with fewer average hits per step than this is dead, and a vector of the step replaces it; 0:
            never.
        decay: decay per step of the moving averages of hits and vectors.

    Example:
        >>> quantizer = VQ(2, init=[[0.0, 0.0], [1.0, 1.0]]).build(2)
        >>> output = quantizer(torch.tensor([[0.9, 0.8], [0.1, -0.2], [2.0, 2.0]]))
        >>> output.out.tolist(), output.codes.flatten().tolist()
        ([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]], [1, 0, 1])
        >>> round(output.loss.item(), 4)  # 1.25 times the mean square
        0.4375
    """

    paper: ClassVar[str] = "VQ-VAE, arXiv 1711.00937"
    cost: ClassVar[str] = "log2 K bits per vector; K distances of width C to encode, a look-up to decode"
    examples: ClassVar[dict[str, str]] = {
        "plain": "VQ(5)",
        "ema": "VQ(7, update='ema', init='kmeans')",
        "respawn, own gradient": "VQ(5, update='ema', estimator='rotation', respawn=0.2, decay=0.5)",
        "no gradient": "VQ(1, update='none', estimator='none')",
    }

    rows_KC: Tensor

    def __init__(
        self,
        codes: int,
        update: str = "gradient",
        init: str | Tensor | Sequence[Sequence[float]] = "random",
        scale: float = 1.0,
        start_step: int = 0,
        estimator: str = "straight_through",
        commitment: float = 0.25,
        detach_input: bool = False,
        detach_target: bool = True,
        respawn: float = 0.0,
        decay: float = 0.99,
    ) -> None:
        super().__init__(codes, start_step, estimator, commitment, detach_input, detach_target)
        if update not in UPDATES:
            raise unknown("update", update, UPDATES)
        if isinstance(init, str) and init not in INITS:
            raise unknown("init", init, INITS)
        if scale <= 0:
            raise UserError(f"scale={scale}: give the standard deviation of random rows, above 0")
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay}: give the decay of the moving averages, from 0 to below 1")
        if respawn < 0 or (respawn and update == "none"):
            raise UserError(
                f"respawn={respawn} with update={update!r}: give the hits per step below which a code is replaced, 0 "
                "or more; it must be 0 with update='none'"
            )
        self.init = init.detach() if isinstance(init, Tensor) else init
        self.update, self.scale, self.decay, self.respawn = update, scale, decay, respawn
        self.learns = update == "gradient"

    def _make(self) -> None:
        if isinstance(self.init, str):
            rows_KC = self.scale * torch.randn(self.codes, self.dim)
        else:
            rows_KC = torch.as_tensor(self.init).clone()
            rows_KC = rows_KC if rows_KC.is_floating_point() else rows_KC.float()
            if rows_KC.shape != (self.codes, self.dim):
                raise UserError(f"init: rows have shape {tuple(rows_KC.shape)}; it must be {(self.codes, self.dim)}")
            self.init = "given"
        if self.learns:
            self.rows_KC = nn.Parameter(rows_KC)
        else:
            self.register_buffer("rows_KC", rows_KC)
        self._make_gate(from_vectors=self.init == "kmeans")
        if self.update == "ema" or self.respawn:
            self.statistics = Statistics(rows_KC, self.decay, self.update == "ema", self.respawn)

    def rows(self) -> Tensor:
        """``[K, C]``."""
        return self.rows_KC

    def _plain_rows(self) -> list[Tensor]:
        """See `Quantizer._plain_rows`."""
        return [self.rows_KC]

    @torch.no_grad()
    def start_from(self, x_MC: Tensor, generator: torch.Generator, per_step: int) -> None:
        """Runs k-means; the hits of each center initialize the statistics of a step."""
        rows_KC, hits_K = kmeans(x_MC, self.codes, generator)
        self.rows_KC.copy_(rows_KC)
        if self.statistics is not None:
            self.statistics.seed(rows_KC, hits_K * (per_step / len(x_MC)))

    def fold(self) -> VQ:
        """See `Quantizer.fold`."""
        return folded(self)


def folded(quantizer: Codebook) -> VQ:
    """Converts a codebook to a plain table with the same codes and vectors; it does not train.

    Raises:
        UserError: the quantizer is still in warm-up.
    """
    if quantizer.gate.closed:
        raise UserError(
            f"{type(quantizer).__name__} is still warming up (start_step={quantizer.start_step}, init from vectors: "
            f"{quantizer.gate.wants_vectors}); train it past its warm-up before folding it"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # do not consume random numbers for the unused init
        plain = VQ(
            quantizer.codes,
            update="none",
            estimator=quantizer.estimator,
            commitment=quantizer.commitment,
            detach_input=quantizer.detach_input,
            detach_target=quantizer.detach_target,
        ).build(quantizer.dim)
        table_KC = quantizer.table()[0, 0]
        plain.to(table_KC.device).rows_KC = table_KC.clone()
    return plain.train(quantizer.training)

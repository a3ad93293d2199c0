"""SimVQ: a codebook computed by a learned map of a frozen random table, so every gradient updates all rows.

Shapes: K codes, C = D width, H hidden width of the map, M vectors used to initialize the map.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.methods.quantize.common.codebook import Codebook
from pondera.methods.quantize.vq import VQ, folded

INITS = ("random", "match")


class SimVQ(Codebook):
    """Vector quantization whose K rows are the image of a frozen random table under a learned map.

    Source: Zhu et al., SimVQ, arXiv 2411.02038: one linear map over a Gaussian table of standard deviation ``C **
    -0.5``. ConceptLM, arXiv 2602.08984, has two layers with a ReLU between them.
    Cost: as `VQ`, plus K C^2 multiplications (two layers: 2 K C H) per call to map the table. `fold` removes these, and
    the memory of the frozen table (K C numbers) and of the map.
    When not to use it: if rows must move one by one, as with k-means or moving averages; use `VQ`.
    Resolved: the map has biases, as in the authors' code. At initialization a map does not match the scale of the
    vectors. ``"match"`` maps the table to the mean and covariance of the vectors (RMS matching in every direction): it
    composes the last layer with an affine map. Least squares from the table to k-means centers would fail: rows are
    random, so no row belongs to any particular center, and the regression keeps only about ``(C/K) ** 0.5`` of the
    scale.

    Args:
        codes: K.
        hidden: H of a two-layer map; default: ``None``, one linear map.
        init: ``"random"``: the default initialization of the layers; ``"match"``: matched to the vectors seen before
            the first quantizing step (without warm-up: to the first batch in training mode).
        start_step: the first optimizer step that quantizes. Before it, the input passes through, codes are `ABSENT`,
            and there are no loss terms.
        estimator: gradient estimator: ``"straight_through"``, ``"rotation"`` or ``"none"``.
        commitment: weight of the term that moves vectors towards their codes.
        detach_input: if true, the loss terms give the vectors no gradient.
        detach_target: if false, drops the stop-gradients of both terms, so each term moves vectors and codes.

    Example:
        >>> quantizer = SimVQ(256, init="match").build(8)
        >>> output = quantizer(3 + torch.randn(100, 8))
        >>> output.out.shape, output.codes.shape, bool(torch.equal(quantizer.fold().decode(output.codes), output.out))
        (torch.Size([100, 8]), torch.Size([100, 1, 1]), True)
    """

    paper: ClassVar[str] = "SimVQ, arXiv 2411.02038"
    cost: ClassVar[str] = "log2 K bits per vector; as VQ once folded; a map of all K rows per call until then"
    examples: ClassVar[dict[str, str]] = {
        "plain": "SimVQ(5)",
        "no gradient": "SimVQ(6, hidden=7, estimator='none')",
        "match": "SimVQ(8, init='match')",
    }

    base_KC: Tensor

    def __init__(
        self,
        codes: int,
        hidden: int | None = None,
        init: str = "random",
        start_step: int = 0,
        estimator: str = "straight_through",
        commitment: float = 0.25,
        detach_input: bool = False,
        detach_target: bool = True,
    ) -> None:
        super().__init__(codes, start_step, estimator, commitment, detach_input, detach_target)
        if hidden is not None and hidden < 1:
            raise UserError(
                f"hidden={hidden}: give the width between the two layers, 1 or more, or None for one linear map"
            )
        if init not in INITS:
            raise unknown("init", init, INITS)
        self.hidden, self.init = hidden, init

    def _make(self) -> None:
        C, H = self.dim, self.hidden
        self.register_buffer("base_KC", torch.randn(self.codes, C) * C**-0.5)
        layers = [nn.Linear(C, C)] if H is None else [nn.Linear(C, H), nn.ReLU(), nn.Linear(H, C)]
        self.map = nn.Sequential(*layers)
        self._make_gate(from_vectors=self.init == "match")

    def rows(self) -> Tensor:
        """``[K, C]``, with gradient to the map."""
        return self.map(self.base_KC)

    @torch.no_grad()
    def start_from(self, x_MC: Tensor, generator: torch.Generator, per_step: int) -> None:
        """Matches the mean and covariance of the rows to the vectors."""
        last = self.map[-1]
        assert isinstance(last, nn.Linear)
        rows_KC = self.rows()
        turn_CC = _root(x_MC) @ torch.linalg.inv(_root(rows_KC))
        shift_C = x_MC.double().mean(0) - turn_CC @ rows_KC.double().mean(0)
        last.bias.copy_(turn_CC @ last.bias.double() + shift_C)
        last.weight.copy_(turn_CC @ last.weight.double())

    def fold(self) -> VQ:
        """See `Quantizer.fold`."""
        return folded(self)


def _root(x_NC: Tensor) -> Tensor:
    """``[C, C]``: the symmetric square root of a covariance, in float64.

    With fewer vectors than dimensions, directions without data get a thousandth of the mean variance.
    """
    centred_NC = x_NC.double() - x_NC.double().mean(0)
    variance_C, axes_CC = torch.linalg.eigh(centred_NC.T @ centred_NC / len(x_NC))
    floor = variance_C.mean().clamp(min=1e-12) * 1e-3
    return axes_CC * variance_C.clamp(min=floor).sqrt() @ axes_CC.T

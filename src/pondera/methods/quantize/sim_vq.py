"""SimVQ: a codebook whose rows are a learned map of a frozen random table, so that every gradient moves all of them.

Shapes: K codes, C = D width, H hidden width of the map, M vectors that the map is matched to.
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
    """The nearest of K rows stands for a vector; the rows are one map, which learns, of a table that does not.

    Source: Zhu et al., SimVQ, arXiv 2411.02038: one linear map over a Gaussian table of standard deviation ``C ** -0.5``.
    ConceptLM, arXiv 2602.08984, has two layers with a ReLU between them.
    Cost: as `VQ`, and K C^2 multiplications (two layers: 2 K C H) per call to map the table; `fold` saves them, and K C
    numbers and the map's.
    When not to use it: where rows are to be moved one by one, as by k-means and averages: those are `VQ`'s.
    Resolved: the map has biases, as the authors' code. Its start: a map does not match the scale of vectors by itself.
    ``"match"`` maps the table to the vectors' mean and covariance (RMS matching in every direction), by composing the
    affine map that does so with the last layer. Least squares from the table to k-means centres would not do: rows are
    random, so nothing tells which centre is whose, and what the regression keeps is about ``(C/K) ** 0.5`` of the scale.

    Args:
        codes: K.
        hidden: H of a two-layer map; none: one linear map.
        init: ``"random"``: the map as its layers start; ``"match"``: matched to the vectors that came before the first
            step that quantizes (without warm-up: to the first batch in training mode).
        start_step: the first optimizer step that quantizes; before it the input passes through, with codes `ABSENT` and
            without terms.
        estimator: what gradient the input gets for the output's: ``"straight_through"``, ``"rotation"``, ``"none"``.
        commitment: weight of the term that moves vectors to codes.
        detach_input: the vectors get no gradient from the terms.
        detach_target: false drops the stop-gradients of both terms, so that each moves vectors and codes.

    Example:
        >>> quantizer = SimVQ(256, init="match").build(8)
        >>> found = quantizer(3 + torch.randn(100, 8))
        >>> found.out.shape, found.codes.shape, bool(torch.equal(quantizer.fold().decode(found.codes), found.out))
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
                f"hidden={hidden}: give the width between two layers, 1 or more, or None for one linear map"
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
        """Gives the rows the vectors' mean and covariance."""
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

    Where there are fewer vectors than directions, those that nothing is known of get a thousandth of the mean variance.
    """
    centred_NC = x_NC.double() - x_NC.double().mean(0)
    variance_C, axes_CC = torch.linalg.eigh(centred_NC.T @ centred_NC / len(x_NC))
    floor = variance_C.mean().clamp(min=1e-12) * 1e-3
    return axes_CC * variance_C.clamp(min=floor).sqrt() @ axes_CC.T

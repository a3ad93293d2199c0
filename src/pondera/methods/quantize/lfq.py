"""LFQ, lookup-free quantization: the code of a vector is the signs of its coordinates.

Shapes: N vectors, C coordinates (bits), D width. In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.methods.quantize.common.codebook import chosen
from pondera.methods.quantize.common.finite import FiniteVectors
from pondera.methods.quantize.common.lattice import Lattice
from pondera.methods.quantize.common.ranks import summed


class LFQ(Lattice):
    """Maps each of C coordinates to its sign, -1 or 1; the C signs are a code of C bits, without a codebook to search.

    Two loss terms keep all codes in use: `"entropy"` makes the signs of each vector certain, and `"diversity"` makes
    both signs of each coordinate equally frequent.

    Source: Language Model Beats Diffusion (MAGVIT-v2), arXiv 2310.05737, section 3.1, equations 3 to 5.
    Cost: C comparisons per vector, and two linear maps if C differs from D.
    When not to use it: without an encoder that trains with it; the signs of arbitrary vectors carry little information.
    Resolved: coordinates are treated as independent, so the entropy over 2^C codes is a sum over C bits; the paper does
    the same for large C, in groups. The second entropy is the entropy of a mean, which part of a batch cannot compute.
    It is linearized in each vector around the moving average of earlier steps; the gradient is the same if this average
    equals the batch mean. Micro-batches and ranks therefore do not change the result. A coordinate of 0 maps to -1.

    Args:
        bits: C; default: ``None``, C = D without linear maps.
        entropy: weight of both entropy terms.
        commitment: weight of ``|z - sign(z)|^2``.
        temperature: temperature of the sign probability, sigmoid(4 z / temperature).
        decay: decay of the moving average; 0: the average of the last step. A slower average lags. It suits batches of
            few vectors and small learning rates; otherwise coordinates overshoot to the other sign and stay there.

    Example:
        >>> quantizer = LFQ().build(3)
        >>> output = quantizer(torch.tensor([0.2, -0.1, 7.0]))
        >>> output.out.tolist(), output.codes.tolist(), sorted(output.terms)
        ([1.0, -1.0, 1.0], [[5]], ['commitment', 'diversity', 'entropy'])
    """

    paper: ClassVar[str] = "LFQ (MAGVIT-v2), arXiv 2310.05737"
    cost: ClassVar[str] = "no codebook, no search; two linear maps where bits are fewer than dimensions"
    examples: ClassVar[dict[str, str]] = {"plain": "LFQ()", "mapped, own gradient": "LFQ(4, entropy=0.5)"}

    ones_C: Tensor
    new_ones_C: Tensor
    num_new: Tensor

    def __init__(
        self,
        bits: int | None = None,
        entropy: float = 0.1,
        commitment: float = 0.25,
        temperature: float = 1.0,
        decay: float = 0.0,
    ) -> None:
        if bits is not None and not 1 <= bits <= 62:
            raise UserError(f"bits={bits}: give 1 to 62, or a Product of smaller quantizers")
        if entropy < 0 or commitment < 0:
            raise UserError(f"entropy={entropy}, commitment={commitment}: give 0 or more")
        if temperature <= 0 or not 0 <= decay < 1:
            raise UserError(
                f"temperature={temperature}, decay={decay}: give a temperature above 0 and a decay in [0, 1)"
            )
        super().__init__(None if bits is None else [2] * bits)
        self.entropy, self.commitment, self.temperature, self.decay = entropy, commitment, temperature, decay
        self._finite = FiniteVectors()
        self._steps_announced = False

    def _make(self) -> None:
        super()._make()
        bits = len(self.counts or ())
        self.register_buffer("ones_C", torch.full((bits,), 0.5))
        self.register_buffer("new_ones_C", torch.zeros(bits))
        self.register_buffer("num_new", torch.zeros(()))

    def begin_step(self, step: int, seed: int) -> None:
        """Updates the average frequency of ones per coordinate with the last step."""
        if step >= 0 and self.learning:
            self._steps_announced = True
            self._settle()

    def _settle(self) -> None:
        if self.num_new:
            self.ones_C.lerp_(self.new_ones_C / self.num_new, 1 - self.decay)
            self.new_ones_C.zero_()
            self.num_new.zero_()

    def _bound(self, z: Tensor) -> Tensor:
        return z

    def _digits(self, bounded: Tensor) -> Tensor:
        return (bounded > 0).long()

    def _values(self, digits: Tensor) -> Tensor:
        return digits * 2.0 - 1

    def _terms(self, z: Tensor, rounded: Tensor) -> dict[str, LossTerm]:
        score_NC = 4 * z / self.temperature
        one_NC = score_NC.sigmoid()
        unsure_NC = torch.nn.functional.binary_cross_entropy_with_logits(score_NC, one_NC, reduction="none")
        if self.training and self.learning:
            self._note(chosen(one_NC.detach(), self._finite.of(z.detach(), repr(self))))
        ones_C = self.ones_C.clamp(1e-6, 1 - 1e-6)
        common_NC = one_NC * ones_C.log() + (1 - one_NC) * (-ones_C).log1p()
        return {
            "commitment": LossTerm((z - rounded).square().sum(), z.numel(), self.commitment),
            "entropy": LossTerm(unsure_NC.sum(), z.numel(), self.entropy),
            "diversity": LossTerm(common_NC.sum(), z.numel(), self.entropy),
        }

    def _note(self, one_NC: Tensor) -> None:
        if not self._steps_announced:
            self._settle()  # without begin_step, each call counts as a step
        self.new_ones_C += summed(one_NC.sum(0))
        self.num_new += summed(one_NC.new_tensor(float(len(one_NC))))

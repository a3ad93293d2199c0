"""Rotary positions of queries, for policies that move queries to other positions.

Shapes: B batch, P pairs of rotated coordinates, D head width; ``...`` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pondera.arch.families import family, listed
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.models.rotary import rotary_frequencies, rotate


@dataclass(frozen=True)
class QueryRotation:
    """The rotary positions of a model.

    Args:
        frequency_P: angle per position of each pair of coordinates, in the layers with full attention.
        interleaved: see `pondera.models.rotary.rotate`.
    """

    frequency_P: Tensor
    interleaved: bool

    @classmethod
    def of(cls, model: PreTrainedModel, method: str, known: QueryRotation | None) -> QueryRotation:
        """The rotary positions of a model.

        Args:
            model: any causal LM of transformers.
            method: the name of the method, for errors.
            known: those of the model that the method already serves.

        Raises:
            UserError: the rotary positions are unknown, change with the length of the sequence, or differ from `known`.
        """
        config = model.config.get_text_config(decoder=True)
        modules = family(config).modules
        if modules is None or modules.rotary is None:
            raise UserError(
                f"{config.model_type}: {method} moves queries by rotary positions, and supports "
                f"{listed(lambda each: each.modules and each.modules.rotary)}; use SnapKV"
            )
        frequency_P = rotary_frequencies(model, "use SnapKV")
        if known is not None and not torch.equal(known.frequency_P, frequency_P):
            raise UserError(
                f"this {method} already serves a model with other rotary positions; create one {method} per model"
            )
        return cls(frequency_P, family(config).interleaved)

    def move(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """Rotates vectors ``[..., D]`` by a number of positions ``[...]``, back if it is negative; float32 or wider."""
        angle = torch.as_tensor(positions, device=x.device)[..., None] * self.frequency_P.to(x.device)
        return rotate(x, angle.cos(), angle.sin(), self.interleaved)

    def average(self, x: Tensor, positions: Tensor) -> Tensor:
        """The mean of vectors ``[..., D]`` rotated to each of some positions ``[..., n]``."""
        angle = positions[..., None] * self.frequency_P.to(x.device)
        return rotate(x, angle.cos().mean(-2), angle.sin().mean(-2), self.interleaved)

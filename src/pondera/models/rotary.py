"""Rotary positions: the rotation, its inverse, and the frequencies of a model.

Shapes: B batch, H heads, S rows, d head width, r rotated coordinates (all of d, or the first of them), P pairs of rotated
coordinates (r / 2). In docstrings ``...`` are any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pondera.arch.dimensions import FULL
from pondera.arch.families import family
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""Types of rotary positions whose frequencies do not change with the length of the sequence."""


def rotate(x: Tensor, cos_P: Tensor, sin_P: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates each pair of the first ``2 P`` coordinates; the others stay. In the wider dtype of vectors and angles.

    Args:
        x: ``[..., d]``.
        cos_P, sin_P: of each pair's angle, ``[..., P]`` of shapes that broadcast to those of `x`.
        interleaved: pairs are coordinates 0 and 1, 2 and 3, ...; else i and i + P.

    Example:
        >>> rotate(torch.tensor([3.0, 4.0, 5.0]), torch.zeros(1), torch.ones(1)).tolist()
        [-4.0, 3.0, 5.0]
    """
    P = cos_P.shape[-1]
    pairs, rest = x[..., : 2 * P], x[..., 2 * P :]
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    rotated = [first * cos_P - second * sin_P, second * cos_P + first * sin_P]
    if interleaved:
        rotated = [torch.stack(rotated, dim=-1).flatten(-2)]
    return torch.cat([*rotated, rest], dim=-1)


def rotate_by_position(x: Tensor, position: Tensor, frequency_P: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates each pair by its frequency times a position; minus the position rotates back.

    Args:
        x: ``[..., S, d]``.
        position: ``[..., S]``, of shapes that broadcast.
        frequency_P: radians per position.
        interleaved: as for `rotate`.
    """
    angle = position[..., None] * frequency_P
    return rotate(x, angle.cos(), angle.sin(), interleaved)


def rotary_frequencies(model: PreTrainedModel, instead: str) -> Tensor:
    """``[P]``: radians per position of each pair, in the layers with full attention.

    Args:
        model: any causal LM of transformers.
        instead: what to do without them, for the error.

    Raises:
        UserError: the frequencies are not found, or change with the length of the sequence.
    """
    config = model.config.get_text_config(decoder=True)
    modules = family(config).modules
    name = "rotary_emb" if modules is None else modules.rotary
    rotary: Any = None if name is None else getattr(model.get_decoder(), name, None)
    found = getattr(rotary, f"{FULL}_inv_freq", getattr(rotary, "inv_freq", None))
    if found is None:
        raise UserError(f"{config.model_type}: its rotary frequencies are not found; {instead}")
    told: Any = getattr(config, "rope_parameters", None) or {}
    kind = getattr(rotary, "rope_type", told.get(FULL, told).get("rope_type", "default"))
    kind = kind[FULL] if isinstance(kind, dict) else kind
    if kind not in FIXED:
        raise UserError(
            f"{config.model_type}: rope_type={kind!r} changes frequencies with the length of the sequence, and fixed ones are "
            f"needed; {instead}"
        )
    return found.detach().float()


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of some positions, applied to queries and keys.

    Args:
        cos_BSr, sin_BSr: outputs of the rotary embedding of the backbone, including its scale; batch may be 1.
        interleaved: as for `rotate`; both angles of a pair are then adjacent in `cos_BSr` and `sin_BSr`, too.

    Example:
        >>> rotary = Rotary(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        >>> rotary.apply(torch.tensor([[[[3.0, 4.0]]]])).tolist(), rotary.undo(torch.tensor([[[[-4.0, 3.0]]]])).tolist()
        ([[[[-4.0, 3.0]]]], [[[[3.0, 4.0]]]])
    """

    cos_BSr: Tensor
    sin_BSr: Tensor
    interleaved: bool = False

    def apply(self, x_BHSd: Tensor) -> Tensor:
        """Rotates vectors by their positions."""
        cos, sin = self._of_pairs(x_BHSd)
        return rotate(x_BHSd, cos, sin, self.interleaved).to(x_BHSd.dtype)

    def undo(self, x_BHSd: Tensor) -> Tensor:
        """Inverse of `apply`, exact for the given cosines and sines, also if they are rounded or scaled."""
        cos, sin = self._of_pairs(x_BHSd)
        scale = cos.square() + sin.square()
        return rotate(x_BHSd, cos / scale, -sin / scale, self.interleaved).to(x_BHSd.dtype)

    def _of_pairs(self, x_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, S, P]``: each angle is given twice, once for each coordinate of its pair."""
        kind = torch.promote_types(x_BHSd.dtype, torch.float32)
        once = slice(None, None, 2) if self.interleaved else slice(self.cos_BSr.shape[-1] // 2)
        return self.cos_BSr[:, None, :, once].to(kind), self.sin_BSr[:, None, :, once].to(kind)

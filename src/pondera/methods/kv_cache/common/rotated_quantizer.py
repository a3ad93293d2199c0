"""Codes of randomly rotated vectors: one norm, and a few bits for each coordinate of the direction.

A random rotation makes the coordinates of any direction alike: each has the distribution of a coordinate of a uniformly
random direction, which is known, so the best levels are, too.

Shapes: B batch, G KV heads, S tokens, D head width, N queries of a KV head, b bits of a coordinate, K levels (2 ** b).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Parts
from pondera.methods.kv_cache.common.bit_packing import pack_bits, unpack_bits

POINTS, ROUNDS = 2**16, 400
"""Points of the density of a coordinate, and rounds of Lloyd's algorithm, which has converged by then for 4 bits."""
LARGEST = torch.finfo(torch.float16).max


class RotatedQuantizer(Codec):
    """Rotates a vector, and rounds each coordinate of its direction to the nearest of ``2 ** bits`` levels.

    ``codes``, ``[B, G, S, D * bits / 8]``, uint8, and ``norm``, ``[B, G, S]``, float16. With `sketch_DD`, products with
    queries are unbiased: ``signs``, ``[B, G, S, D / 8]``, are those of the rounding error times this matrix, and ``rest``,
    ``[B, G, S]``, float16, is its norm.

    Args:
        bits: b, 0 to 8; without levels (0) only the signs describe a direction.
        rotation_DD: an orthogonal matrix.
        sketch_DD: a matrix of independent standard normal numbers; default: `None`, no signs.

    Example:
        >>> codec = RotatedQuantizer(4, random_rotation(64, seed=0))
        >>> x = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(0))
        >>> error = codec.decode(codec.encode(x)) - x
        >>> round(float(error.square().sum() / x.square().sum()), 3)
        0.009
    """

    alike = True
    queries = 256  # queries are rotated instead of rows; above, attention works in blocks that would look rows up again

    def __init__(self, bits: int, rotation_DD: Tensor, sketch_DD: Tensor | None = None) -> None:
        self.bits, self.rotation_DD, self.sketch_DD = bits, rotation_DD, sketch_DD
        self.level_K = best_levels(bits, rotation_DD.shape[0])

    def entry(self, name: str) -> int:
        """See `Codec.entry`."""
        return 1

    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None = None) -> Parts:
        """See `Codec.encode`."""
        self._move_to(x_BGSD.device)
        x_BGSD = x_BGSD.float()
        norm_BGS = x_BGSD.norm(dim=-1).clamp(max=LARGEST)
        direction_BGSD = (x_BGSD / norm_BGS[..., None].clamp(min=1e-30)) @ self.rotation_DD.T
        middle_K = (self.level_K[1:] + self.level_K[:-1]) / 2
        level_BGSD = torch.bucketize(direction_BGSD, middle_K).to(torch.uint8)
        parts = {"norm": norm_BGS.half()}
        if self.bits:
            parts["codes"] = pack_bits(level_BGSD, self.bits)
        if self.sketch_DD is not None:
            rest_BGSD = direction_BGSD - self.level_K[level_BGSD.int()]
            parts["rest"] = rest_BGSD.norm(dim=-1).half()
            parts["signs"] = pack_bits((rest_BGSD @ self.sketch_DD.T > 0).to(torch.uint8), 1)
        return parts

    def decode(self, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.decode`."""
        return self._rotated(parts) @ self.rotation_DD

    def dot(self, query_BGND: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.dot`: with rotated queries."""
        rows_BGSD = self._rotated(parts)
        return query_BGND.to(rows_BGSD.dtype) @ self.rotation_DD.T @ rows_BGSD.mT

    def mix(self, weight_BGNS: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.mix`: rotates the sums back."""
        rows_BGSD = self._rotated(parts)
        return weight_BGNS.to(rows_BGSD.dtype) @ rows_BGSD @ self.rotation_DD

    def _rotated(self, parts: Parts) -> Tensor:
        """``[B, G, S, D]``: decoded vectors, still rotated."""
        norm_BGS = parts["norm"]
        self._move_to(norm_BGS.device)
        if self.bits:
            direction_BGSD = self.level_K[unpack_bits(parts["codes"], self.bits).int()]
        else:
            direction_BGSD = self.level_K.expand(*norm_BGS.shape, self.rotation_DD.shape[0])
        if self.sketch_DD is not None:
            # For standard normal s, the mean of sign(s r) (s q) is sqrt(2 / pi) (r q) / |r|.
            factor_BGS = parts["rest"].float() * math.sqrt(math.pi / 2) / len(self.sketch_DD)
            sign_BGSD = unpack_bits(parts["signs"], 1).float() * 2 - 1
            direction_BGSD = direction_BGSD + factor_BGS[..., None] * (sign_BGSD @ self.sketch_DD)
        return direction_BGSD * norm_BGS.float()[..., None]

    def _move_to(self, device: torch.device) -> None:
        """Moves the matrices to the device of the cache, once."""
        if self.rotation_DD.device != device:
            self.rotation_DD, self.level_K = self.rotation_DD.to(device), self.level_K.to(device)
            self.sketch_DD = None if self.sketch_DD is None else self.sketch_DD.to(device)


def random_rotation(width: int, seed: int) -> Tensor:
    """``[D, D]``: a uniformly random orthogonal matrix.

    Args:
        width: D.
        seed: the same seed gives the same matrix.
    """
    gaussian_DD = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q_DD, r_DD = torch.linalg.qr(gaussian_DD)
    return (q_DD * r_DD.diagonal().sign()).float()  # with these signs it is uniform, whatever signs the algorithm picks


def best_levels(bits: int, width: int) -> Tensor:
    """``[K]``: the levels with the smallest mean squared error for one coordinate of a uniformly random direction.

    Such a coordinate t has a density proportional to ``(1 - t ** 2) ** ((D - 3) / 2)``, close to a normal one of variance
    1 / D. Lloyd's algorithm finds the levels: each is the mean of the numbers that are nearest to it.

    Args:
        bits: b.
        width: D, 2 or more.

    Example:
        >>> [round(level, 3) for level in (best_levels(1, 1024) * 1024**0.5).tolist()]  # near sqrt(2 / pi)
        [-0.798, 0.798]
    """
    end = min(1.0, 8 / math.sqrt(width))
    t_n = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * 2 * end - end
    density_n = (1 - t_n.square()) ** ((width - 3) / 2)
    mass_n = torch.cat([torch.zeros(1, dtype=torch.float64), density_n.cumsum(0)])
    moment_n = torch.cat([torch.zeros(1, dtype=torch.float64), (density_n * t_n).cumsum(0)])
    share_K = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    level_K = t_n[torch.searchsorted(mass_n[1:], share_K * mass_n[-1])]
    for _ in range(ROUNDS):
        edges = torch.searchsorted(t_n, (level_K[1:] + level_K[:-1]) / 2)
        edges = torch.cat([edges.new_tensor([0]), edges, edges.new_tensor([POINTS])])
        level_K = moment_n[edges].diff() / mass_n[edges].diff()
    return level_K.float()

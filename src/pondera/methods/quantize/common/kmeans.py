"""k-means clustering, to initialize a codebook from data.

Shapes: N vectors, K centers, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.common.nearest import cluster_sums, nearest

ROUNDS = 8
"""Number of rounds in which initial centers are drawn; k-means++ uses one round per center."""
JITTER = 1e-3
"""Noise added to further copies of a vector, as a share of the RMS of the vectors."""


@torch.no_grad()
def kmeans(x_NC: Tensor, size: int, generator: torch.Generator, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from spread-out initial centers; deterministic for a given generator.

    The initial centers are rows, drawn with probability proportional to the squared distance from the centers drawn so
    far, as in k-means++ (Arthur and Vassilvitskii, 2007), but many per round. An empty center is replaced by a row
    drawn in the same way.

    Cost: `iterations` + 2 assignments of all vectors.

    Args:
        x_NC: at least one vector; with fewer than K vectors, the other centers are noisy copies.
        size: K.
        generator: random generator.
        iterations: rounds of assignment and mean.

    Returns:
        The centers ``[K, C]``, and the number of vectors assigned to each, ``[K]``, int64.

    Raises:
        UserError: no vector, no center, or a vector that is not finite.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> centres, counts = kmeans(x, 2, torch.Generator().manual_seed(0))
        >>> [round(c, 1) for c in sorted(centres.flatten().tolist())], counts.tolist()
        ([0.1, 5.1], [2, 2])
    """
    if len(x_NC) == 0 or size < 1:
        raise UserError(f"k-means of {len(x_NC)} vectors into {size} centers: give at least one of each")
    x_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    if not x_NC.isfinite().all():
        raise UserError("k-means needs finite numbers; the vectors contain inf or nan")
    if len(x_NC) <= size:
        centres_KC = _copies(x_NC, size, generator)
        return centres_KC, torch.bincount(nearest(x_NC, centres_KC), minlength=size)
    centres_KC = _spread(x_NC, size, generator)
    codes_N = nearest(x_NC, centres_KC)
    for _ in range(iterations):
        sums_KC, counts_K = cluster_sums(x_NC, codes_N, size)
        empty_K = counts_K == 0
        drawn_KC = centres_KC.clone()
        if empty_K.any():
            drawn_KC[empty_K] = _draw(x_NC, _distances(x_NC, centres_KC[codes_N]), int(empty_K.sum()), generator)
        centres_KC = torch.where(empty_K[:, None], drawn_KC, sums_KC / counts_K[:, None])
        codes_N = nearest(x_NC, centres_KC)
    return centres_KC, torch.bincount(codes_N, minlength=size)


def _copies(x_NC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Repeats all vectors; noise is added from the second repetition on."""
    centres_KC = x_NC[torch.arange(size, device=x_NC.device) % len(x_NC)]
    noise = torch.randn(centres_KC.shape, generator=generator, device=generator.device).to(centres_KC)
    noise[: len(x_NC)] = 0
    return centres_KC + noise * (JITTER * x_NC.square().mean().sqrt())


def _spread(x_NC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws spread-out rows as initial centers."""
    distances_N = x_NC.new_ones(len(x_NC))
    drawn = []
    for group in torch.arange(size).tensor_split(min(ROUNDS, size)):
        drawn.append(_draw(x_NC, distances_N, len(group), generator))
        from_new_N = _distances(x_NC, drawn[-1][nearest(x_NC, drawn[-1])])
        distances_N = torch.minimum(distances_N, from_new_N) if len(drawn) > 1 else from_new_N
    return torch.cat(drawn)


def _draw(x_NC: Tensor, weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws rows without replacement, with probability proportional to weights; rows of weight zero come last."""
    wait_N = torch.empty(len(x_NC), device=generator.device).exponential_(generator=generator)
    return x_NC[(wait_N.to(weight_N) / weight_N).topk(count, largest=False).indices]


def _distances(x_NC: Tensor, y_NC: Tensor) -> Tensor:
    """Squared."""
    return (x_NC - y_NC).square().sum(1)

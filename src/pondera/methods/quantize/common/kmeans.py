"""k-means: a codebook from data.

Shapes: N vectors, K centres, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.common.nearest import cluster_sums, nearest

ROUNDS = 8
"""In so many rounds the first centres are drawn; k-means++ takes one for each centre."""
JITTER = 1e-3
"""How far a vector's further copies are moved, as a share of the vectors' root mean square."""


@torch.no_grad()
def kmeans(x_NC: Tensor, size: int, generator: torch.Generator, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from centres that are drawn far from each other; the same for the same generator.

    The first centres are rows drawn with probabilities in proportion to the squared distance from those there are already,
    as in k-means++ (Arthur and Vassilvitskii, 2007), but many at a time. A centre that nothing is nearest to becomes a row
    that is drawn in the same way.

    Cost: `iterations` + 2 assignments of all vectors.

    Args:
        x_NC: at least one vector; of fewer than K, further centres are copies of them, moved a little.
        size: K.
        generator: draws.
        iterations: of assignment and mean.

    Returns:
        The centres ``[K, C]``, and how many vectors are nearest to each of them, ``[K]``, int64.

    Raises:
        UserError: no vector, no centre, or a vector that is not finite.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> centres, counts = kmeans(x, 2, torch.Generator().manual_seed(0))
        >>> [round(c, 1) for c in sorted(centres.flatten().tolist())], counts.tolist()
        ([0.1, 5.1], [2, 2])
    """
    if len(x_NC) == 0 or size < 1:
        raise UserError(f"k-means of {len(x_NC)} vectors into {size} centres: give at least one of each")
    x_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    if not x_NC.isfinite().all():
        raise UserError("k-means needs finite numbers; the vectors hold inf or nan")
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
    """All vectors, again and again, but for the first time moved by noise."""
    centres_KC = x_NC[torch.arange(size, device=x_NC.device) % len(x_NC)]
    noise = torch.randn(centres_KC.shape, generator=generator, device=generator.device).to(centres_KC)
    noise[: len(x_NC)] = 0
    return centres_KC + noise * (JITTER * x_NC.square().mean().sqrt())


def _spread(x_NC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Rows far from each other."""
    distances_N = x_NC.new_ones(len(x_NC))
    drawn = []
    for group in torch.arange(size).tensor_split(min(ROUNDS, size)):
        drawn.append(_draw(x_NC, distances_N, len(group), generator))
        from_new_N = _distances(x_NC, drawn[-1][nearest(x_NC, drawn[-1])])
        distances_N = torch.minimum(distances_N, from_new_N) if len(drawn) > 1 else from_new_N
    return torch.cat(drawn)


def _draw(x_NC: Tensor, weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows without repetition, with probabilities in proportion to weights; those without any weight come last."""
    wait_N = torch.empty(len(x_NC), device=generator.device).exponential_(generator=generator)
    return x_NC[(wait_N.to(weight_N) / weight_N).topk(count, largest=False).indices]


def _distances(x_NC: Tensor, y_NC: Tensor) -> Tensor:
    """Squared."""
    return (x_NC - y_NC).square().sum(1)

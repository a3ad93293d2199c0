"""Which row of a table is nearest to each vector, and the sums of the vectors that went to each row.

Shapes: N vectors, K rows of a table, C width of both, G tables of their own vectors; n vectors and k rows of a tile of
scores, in blocks of 16 rows (b blocks).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pondera.ground.errors import unknown

METRICS = ("euclidean", "cosine")
ROWS = 1024
"""Rows of a tile at most."""
SCORES = 2**20
"""Scores of a tile per thread: few enough to stay in cache, and so many that the calls of torch cost little beside them."""
BLOCK = 16
SMALL = 2**16
"""Scores of a table up to which a search takes the short way on a CPU, too."""
WHOLE = 2**24
"""Scores at a time on the short way."""
SUMMED = 2**16
"""Vectors that are summed at a time, so that float32 has no long sums to round."""


@torch.no_grad()
def nearest(x: Tensor, table: Tensor, metric: str = "euclidean") -> Tensor:
    """The row of a table that each vector is nearest to; of rows that are the same, the first.

    Scores are products with the rows of which half a squared norm is taken, all seen from the mean of the rows, so a common
    offset costs no precision. The choice is the nearest row up to what float32 rounds away in them.

    Cost: 2 N K C floating-point operations in matrix products; memory for one tile of scores, whatever N and K are.

    Args:
        x: ``[N, C]``, or ``[G, N, C]`` with a table for each group.
        table: ``[K, C]`` or ``[G, K, C]``, K at least 1.
        metric: ``"euclidean"``, or ``"cosine"`` for the smallest angle.

    Returns:
        ``[N]`` or ``[G, N]``, int64.

    Raises:
        UserError: another metric.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.2], [0.1, 0.8]]), torch.eye(2)).tolist()
        [0, 1]
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if x.ndim == 2:
        return nearest(x[None], table[None], metric)[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    table_GKC = table.to(dtype)
    if metric == "cosine":  # the vectors' own lengths change nothing
        table_GKC = functional.normalize(table_GKC, dim=-1)
        centre_G1C, offset_GK = torch.zeros_like(table_GKC[:, :1]), table_GKC.new_zeros(table.shape[:2])
    else:
        centre_G1C = table_GKC.mean(1, keepdim=True)
        table_GKC = table_GKC - centre_G1C
        offset_GK = table_GKC.square().sum(-1) / -2
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or x.shape[1] * table.shape[1] <= SMALL:
            return _short(x, table_GKC, centre_G1C, offset_GK)
        return torch.stack([_tiled(*group) for group in zip(x, table_GKC, centre_G1C, offset_GK, strict=True)])


def _short(x_GNC: Tensor, table_GKC: Tensor, centre_G1C: Tensor, offset_GK: Tensor) -> Tensor:
    """By torch's own argmax: fast where it is vectorized, and the least overhead on few scores."""
    chunk = max(1, WHOLE // max(1, offset_GK.numel()))
    codes = [
        torch.baddbmm(offset_GK[:, None], x_GnC - centre_G1C, table_GKC.mT).argmax(-1)
        for x_GnC in x_GNC.split(chunk, 1)
    ]
    return torch.cat(codes, 1)


def _tiled(x_NC: Tensor, table_KC: Tensor, centre_1C: Tensor, offset_K: Tensor) -> Tensor:
    """The same by tiles of scores, from which elementwise operations alone find the best row.

    torch's argmax takes longer on a CPU than the products do. A maximum over each block of rows is vectorized; only the
    blocks' maxima, and then the rows of the best block, have to be searched.
    """
    total, width = x_NC.shape
    tiles = math.ceil(len(table_KC) / ROWS)
    rows = BLOCK * math.ceil(len(table_KC) / tiles / BLOCK)
    vectors = min(total, max(1, SCORES * torch.get_num_threads() // rows))
    # The offset is one more column, met by a one. Rows that fill the last tile up are never the best.
    rows_tkC = table_KC.new_zeros(tiles * rows, width + 1)
    rows_tkC[:, -1] = -math.inf
    rows_tkC[: len(table_KC)] = torch.cat([table_KC, offset_K[:, None]], 1)
    x_nC = table_KC.new_ones(vectors, width + 1)
    scores_kn = table_KC.new_empty(rows, vectors)
    codes_N = torch.empty(total, dtype=torch.int64)
    for start in range(0, total, vectors):
        codes_n = codes_N[start : start + vectors]
        if len(codes_n) < vectors:
            x_nC, scores_kn = x_nC[: len(codes_n)], table_KC.new_empty(rows, len(codes_n))
        torch.sub(x_NC[start : start + vectors], centre_1C, out=x_nC[:, :-1])
        found = [_highest(torch.mm(rows_kC, x_nC.T, out=scores_kn)) for rows_kC in rows_tkC.split(rows)]
        highest_n, row_n = found[0]
        if tiles > 1:
            highest_tn = torch.stack([highest_n for highest_n, _ in found])
            tile_n = _first(highest_tn, highest_tn.amax(0))
            row_n = torch.stack([row_n for _, row_n in found]).gather(0, tile_n.long()[None])[0] + tile_n * rows
        codes_n.copy_(row_n)
    return codes_N


def _highest(scores_kn: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of each column, and its first row."""
    count = scores_kn.shape[1]
    blocks_b16n = scores_kn.view(-1, BLOCK, count)
    maxima_bn = blocks_b16n.amax(1)
    highest_n = maxima_bn.amax(0)
    block_n = _first(maxima_bn, highest_n)
    block_16n = blocks_b16n.gather(0, block_n.long().expand(1, BLOCK, count))[0]
    return highest_n, block_n * BLOCK + _first(block_16n, highest_n)


def _first(scores_kn: Tensor, highest_n: Tensor) -> Tensor:
    """The first row that has the column's highest score, as a float, which is faster; overwrites the scores."""
    row_k1 = torch.arange(len(scores_kn), dtype=scores_kn.dtype)[:, None]
    behind_kn = scores_kn.sub_(highest_n).sign_()  # 0 where highest (and of what is no number), else -1
    return torch.sub(row_k1, behind_kn, alpha=len(scores_kn), out=behind_kn).amin(0)


@torch.no_grad()
def cluster_sums(x_NC: Tensor, codes_N: Tensor, size: int, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of the vectors of each code, and how many there are; the same on every run and for any number of threads.

    Args:
        x_NC: the vectors.
        codes_N: int64, below `size`; vectors with a negative code are left out.
        size: K.
        weight_N: how much each vector counts; none: 1.

    Returns:
        ``[K, C]`` and ``[K]``, float32 or, as x, float64.

    Example:
        >>> sums, counts = cluster_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, -1, 1]), 3)
        >>> sums.flatten().tolist(), counts.tolist()
        ([0.0, 5.0, 0.0], [0.0, 2.0, 0.0])
    """
    dtype = torch.promote_types(x_NC.dtype, torch.float32)
    sums_KC, counts_K = x_NC.new_zeros(size, x_NC.shape[1], dtype=dtype), x_NC.new_zeros(size, dtype=dtype)
    for start in range(0, len(x_NC), SUMMED):
        part = slice(start, start + SUMMED)
        # Bags of vectors: one for each code, in front of them one for those that have none.
        bag_n = codes_N[part].clamp(min=-1) + 1
        order_n = bag_n.int().sort(stable=True).indices
        hits = torch.bincount(bag_n, minlength=size + 1)
        bags = (order_n, hits.cumsum(0) - hits)
        weight_n = None if weight_N is None else weight_N[part].to(dtype)
        counts_K += hits[1:] if weight_n is None else _bag_sums(weight_n[:, None], *bags)[:, 0]
        sums_KC += _bag_sums(x_NC[part].to(dtype), *bags, weight_n)
    return sums_KC, counts_K


def _bag_sums(x_nC: Tensor, order_n: Tensor, starts: Tensor, weight_n: Tensor | None = None) -> Tensor:
    """Sums over runs of a sorted order, without the run in front."""
    weights = None if weight_n is None else weight_n[order_n]
    return functional.embedding_bag(order_n, x_nC, starts, mode="sum", per_sample_weights=weights)[1:]

"""Nearest-row search in a table, and sums of the vectors assigned to each row.

Shapes: N vectors, K rows of a table, C width of both, G groups, each with its own table and vectors; n vectors and k
rows of a tile of scores, in blocks of 16 rows (b blocks).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from pondera.core.errors import unknown
from pondera.kernels.call import fit, run

METRICS = ("euclidean", "cosine")
ROWS = 1024
"""Maximum number of rows of a tile."""
SCORES = 2**20
"""Scores per tile and thread: few enough to stay in the CPU cache, enough to amortize the overhead of torch calls."""
BLOCK = 16
SMALL = 2**16
"""Up to this many scores per table, a search on a CPU uses the direct method too."""
WHOLE = 2**24
"""Number of scores computed at a time by the direct method."""
SUMMED = 2**16
"""Number of vectors summed at a time, to limit rounding errors of long float32 sums."""


@torch.no_grad()
def nearest(x: Tensor, table: Tensor, metric: str = "euclidean") -> Tensor:
    """The index of the nearest table row for each vector; among equal rows, the first.

    A score is the product with a row minus half its squared norm, both relative to the mean of the rows, so a common
    offset costs no precision. The result is the nearest row up to float32 rounding of the scores. A vector with nan
    gets a valid code.

    Cost: 2 N K C floating-point operations. On CPUs a native kernel runs at about the speed of a matrix product and
    stores no scores; otherwise, or if the kernel cannot be built, scores are computed in tiles of bounded size.

    Args:
        x: ``[N, C]``, or ``[G, N, C]`` with a table for each group.
        table: ``[K, C]`` or ``[G, K, C]``, K at least 1.
        metric: ``"euclidean"``, or ``"cosine"`` for the smallest angle.

    Returns:
        ``[N]`` or ``[G, N]``, int64.

    Raises:
        UserError: unknown metric.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.2], [0.1, 0.8]]), torch.eye(2)).tolist()
        [0, 1]
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if x.ndim == 2:
        return nearest(x[None], table[None], metric)[0]
    table_GKC = table.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        seen = _seen(table_GKC, metric)
        codes_by_group = [
            _native(x_NC, *group) for x_NC, *group in zip(x, *(each.split(1) for each in seen), strict=True)
        ]
        codes = [codes_N1[:, 0] for codes_N1 in codes_by_group if codes_N1 is not None]
        if len(codes) < len(codes_by_group):
            if x.device.type != "cpu" or x.shape[1] * table.shape[1] <= SMALL:
                return _short(x, *seen)
            codes = [_tiled(*group) for group in zip(x, *seen, strict=True)]
        return torch.stack(codes) if codes else x.new_empty(x.shape[:2], dtype=torch.int64)


@torch.no_grad()
def nearest_by_levels(x_NC: Tensor, table_RKC: Tensor) -> Tensor:
    """Residual nearest-row search: each table codes the residual of the rows chosen before it.

    Equivalent to `nearest` in one table, subtracting the row, `nearest` in the next table, and so on. The native kernel
    processes a vector with all tables while it is in the cache of a core.

    Args:
        x_NC: the vectors.
        table_RKC: the tables, in order.

    Returns:
        ``[N, R]``, int64.

    Example:
        >>> nearest_by_levels(torch.tensor([[7.1], [3.8]]), torch.tensor([[[4.0], [8.0]], [[-1.0], [0.0]]])).tolist()
        [[1, 0], [0, 1]]
    """
    table_RKC = table_RKC.to(torch.promote_types(x_NC.dtype, torch.float32))
    native_NR = _native(x_NC, *_seen(table_RKC, "euclidean"), table_RKC)
    if native_NR is not None:
        return native_NR
    codes: list[Tensor] = []
    for table_KC in table_RKC:
        codes.append(nearest(x_NC, table_KC))
        x_NC = x_NC - table_KC[codes[-1]]
    return torch.stack(codes, 1)


def _seen(table_GKC: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """The tables for scoring, ``[G, K, C]``, the origin of vectors, ``[G, 1, C]``, and score offsets, ``[G, K]``."""
    if metric == "cosine":  # the norms of the vectors do not matter
        table_GKC = functional.normalize(table_GKC, dim=-1)
        return table_GKC, torch.zeros_like(table_GKC[:, :1]), table_GKC.new_zeros(table_GKC.shape[:2])
    centre_G1C = table_GKC.mean(1, keepdim=True)
    table_GKC = table_GKC - centre_G1C
    return table_GKC, centre_G1C, table_GKC.square().sum(-1) / -2


def _native(
    x_NC: Tensor, table_RKC: Tensor, centre_R1C: Tensor, offset_RK: Tensor, rows_RKC: Tensor | None = None
) -> Tensor | None:
    """Codes ``[N, R]`` from the native kernel, or ``None`` if it does not apply. One level needs no rows."""
    if x_NC.device.type != "cpu":
        return None
    x_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    x_NC = x_NC if x_NC.stride(1) == 1 else x_NC.contiguous()
    table_RKC = table_RKC.contiguous()
    if not fit(x_NC[:1], table_RKC, centre_R1C, offset_RK, *([] if rows_RKC is None else [rows_RKC])):
        return None
    (R, K, C), N = table_RKC.shape, len(x_NC)
    codes_NR = torch.empty(N, R, dtype=torch.int64)
    sizes = (N, K, C, R, torch.get_num_threads())
    done = run("nearest", x_NC, x_NC.stride(0), rows_RKC, centre_R1C, table_RKC, offset_RK, *sizes, codes_NR)
    return codes_NR if done else None


def _short(x_GNC: Tensor, table_GKC: Tensor, centre_G1C: Tensor, offset_GK: Tensor) -> Tensor:
    """The direct method, with torch's argmax: fast where argmax is vectorized, and least overhead for few scores."""
    chunk = max(1, WHOLE // max(1, offset_GK.numel()))
    codes = [
        torch.baddbmm(offset_GK[:, None], x_GnC - centre_G1C, table_GKC.mT).argmax(-1)
        for x_GnC in x_GNC.split(chunk, 1)
    ]
    return torch.cat(codes, 1)


def _tiled(x_NC: Tensor, table_KC: Tensor, centre_1C: Tensor, offset_K: Tensor) -> Tensor:
    """Tiled search: finds the best row of each tile of scores with elementwise operations only.

    On a CPU, torch's argmax takes longer than the products. A maximum over each block of rows is vectorized; the search
    then covers only the block maxima and the rows of the best block.
    """
    total, width = x_NC.shape
    tiles = math.ceil(len(table_KC) / ROWS)
    rows = BLOCK * math.ceil(len(table_KC) / tiles / BLOCK)
    # Use whole blocks of vectors too: matrix products may treat edges differently, so equal rows could get different
    # scores.
    vectors = BLOCK * math.ceil(min(total, max(1, SCORES * torch.get_num_threads() // rows)) / BLOCK)
    # The offset is an extra column, multiplied by one. Rows that pad the last tile never win.
    rows_tkC = table_KC.new_zeros(tiles * rows, width + 1)
    rows_tkC[:, -1] = -math.inf
    rows_tkC[: len(table_KC)] = torch.cat([table_KC, offset_K[:, None]], 1)
    x_nC = table_KC.new_ones(vectors, width + 1)
    scores_kn = table_KC.new_empty(rows, vectors)
    codes_N = torch.empty(total, dtype=torch.int64)
    for start in range(0, total, vectors):
        codes_n = codes_N[start : start + vectors]
        torch.sub(x_NC[start : start + vectors], centre_1C, out=x_nC[: len(codes_n), :-1])
        best = [_highest(torch.mm(rows_kC, x_nC.T, out=scores_kn)) for rows_kC in rows_tkC.split(rows)]
        highest_n, row_n = best[0]
        if tiles > 1:
            highest_tn = torch.stack([highest_n for highest_n, _ in best])
            tile_n = _first(highest_tn, highest_tn.amax(0))
            row_n = torch.stack([row_n for _, row_n in best]).gather(0, tile_n.long()[None])[0] + tile_n * rows
        codes_n.copy_(row_n[: len(codes_n)])
    return codes_N


def _highest(scores_kn: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of each column, and the first row that has it."""
    count = scores_kn.shape[1]
    blocks_b16n = scores_kn.view(-1, BLOCK, count)
    maxima_bn = blocks_b16n.amax(1)
    highest_n = maxima_bn.amax(0)
    block_n = _first(maxima_bn, highest_n)
    block_16n = blocks_b16n.gather(0, block_n.long().expand(1, BLOCK, count))[0]
    return highest_n, block_n * BLOCK + _first(block_16n, highest_n)


def _first(scores_kn: Tensor, highest_n: Tensor) -> Tensor:
    """The first row with the column's highest score, as a float, which is faster; overwrites the scores."""
    row_k1 = torch.arange(len(scores_kn), dtype=scores_kn.dtype)[:, None]
    below_kn = scores_kn.sub_(highest_n).sign_()  # 0 where highest (and of what is no number), else -1
    return torch.sub(row_k1, below_kn, alpha=len(scores_kn), out=below_kn).amin(0)


@torch.no_grad()
def cluster_sums(x_NC: Tensor, codes_N: Tensor, size: int, weight_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of the vectors of each code; deterministic, and independent of the number of threads.

    Args:
        x_NC: the vectors.
        codes_N: int64, below `size`; vectors with a negative code are excluded.
        size: K.
        weight_N: weight of each vector; default: ``None``, 1.

    Returns:
        ``[K, C]`` and ``[K]``, float64 if x is, else float32.

    Example:
        >>> sums, counts = cluster_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, -1, 1]), 3)
        >>> sums.flatten().tolist(), counts.tolist()
        ([0.0, 5.0, 0.0], [0.0, 2.0, 0.0])
    """
    dtype = torch.promote_types(x_NC.dtype, torch.float32)
    sums_KC, counts_K = x_NC.new_zeros(size, x_NC.shape[1], dtype=dtype), x_NC.new_zeros(size, dtype=dtype)
    if _native_sums(x_NC.to(dtype), codes_N, weight_N, sums_KC, counts_K):
        return sums_KC, counts_K
    for start in range(0, len(x_NC), SUMMED):
        part = slice(start, start + SUMMED)
        # One bag of vectors for each code, preceded by one bag for vectors without a code.
        bag_n = codes_N[part].clamp(min=-1) + 1
        order_n = bag_n.int().sort(stable=True).indices
        hits = torch.bincount(bag_n, minlength=size + 1)
        bags = (order_n, hits.cumsum(0) - hits)
        weight_n = None if weight_N is None else weight_N[part].to(dtype)
        counts_K += hits[1:] if weight_n is None else _bag_sums(weight_n[:, None], *bags)[:, 0]
        sums_KC += _bag_sums(x_NC[part].to(dtype), *bags, weight_n)
    return sums_KC, counts_K


def _native_sums(x_NC: Tensor, codes_N: Tensor, weight_N: Tensor | None, sums_KC: Tensor, counts_K: Tensor) -> bool:
    """True if the native kernel supports these inputs."""
    weights = [] if weight_N is None else [weight_N]
    if not fit(x_NC, *weights) or codes_N.dtype != torch.int64 or not codes_N.is_contiguous() or len(x_NC) >= 2**31:
        return False
    sizes = (len(x_NC), *sums_KC.shape, torch.get_num_threads())
    return run("sums", x_NC, x_NC.stride(0), codes_N, weight_N, *sizes, sums_KC, counts_K)


def _bag_sums(x_nC: Tensor, order_n: Tensor, starts: Tensor, weight_n: Tensor | None = None) -> Tensor:
    """Sums over runs in sorted order, without the leading run."""
    weights = None if weight_n is None else weight_n[order_n]
    return functional.embedding_bag(order_n, x_nC, starts, mode="sum", per_sample_weights=weights)[1:]

"""Codebook health: usage, perplexity, effective ranks, crowding and error, because each number alone misleads.

Shapes: N vectors, D width, G groups, R levels, K codes per codebook, C width of a codebook's rows. In docstrings
``...`` are any leading dimensions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CLOSE = 0.1
"""A row is crowded if its nearest row is closer than this share of the median distance between rows."""
PROBED = 1024
"""`crowding` samples this many evenly spaced rows of a larger codebook."""
CHUNK = 2**15
"""Number of vectors converted to float64 at a time."""


@dataclass(frozen=True)
class Health:
    """Health measures of a quantizer on one batch. ``None`` means undefined, e.g. without vectors.

    Args:
        vectors: number of quantized vectors, without masked ones.
        usage: ``[G][R]``, share of codes that occur. Not a measure of health alone: on data with 64 clusters a good
            codebook of 256 codes uses a quarter.
        perplexity: ``[G][R]``, effective number of codes, exp(entropy); at most usage times K.
        effective_rank_codes: per group, effective rank of the decoded vectors, so codes are weighted by use.
        effective_rank_input: per group, effective rank of the input vectors; if it is low, no codebook helps.
        crowding: ``[G][R]``, share of rows with another row close by; ``None`` without a table.
        split_error: mean ||x - q||^2 as a share of the variance; 1 is no better than the mean.
        variance: tr Cov(x).
    """

    vectors: int
    usage: list[list[float | None]]
    perplexity: list[list[float | None]]
    effective_rank_codes: list[float | None]
    effective_rank_input: list[float | None]
    crowding: list[list[float | None]] | None
    split_error: float | None
    variance: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return dataclasses.asdict(self)


@torch.no_grad()
def health(x: Tensor, q: Tensor, codes: Tensor, table: Tensor | None = None, sizes: Tensor | None = None) -> Health:
    """Measures a batch, without side effects.

    Source: Representation Collapsing Problems in Vector Quantization, arXiv 2411.16550, and its later version
    2603.17052.
    Cost: N * D^2 multiplications in float64, and distances between up to 1024 rows and all rows of each codebook.
    Resolved: groups are equal contiguous parts of D, for x and q, even if a product has reordered D. The median
    distance for crowding is over all pairs of rows.

    Args:
        x: ``[..., D]``, the vectors; vectors with inf or nan are excluded.
        q: ``[..., D]``, the decoded vectors.
        codes: ``[..., G, R]``; negative codes are excluded, and so is a vector with no other code.
        table: ``[G, R, K, C]``, the codebooks, or ``None``.
        sizes: ``[G, R]``, number of codes per codebook; default: ``None``, K. Without sizes and table the usage is
            undefined.

    Example:
        >>> x = torch.eye(4)
        >>> output = health(x, x, torch.tensor([0, 1, 2, 3]).view(4, 1, 1), torch.eye(4).view(1, 1, 4, 4))
        >>> output.usage, output.split_error, round(output.effective_rank_input[0], 6)
        ([[1.0]], 0.0, 3.0)
    """
    groups, levels = codes.shape[-2:]
    x_ND, q_ND = x.reshape(-1, x.shape[-1]), q.reshape(-1, q.shape[-1])
    codes_NGR = codes.reshape(len(x_ND), groups, levels)
    if groups * levels:
        kept_N = (codes_NGR >= 0).flatten(1).any(1) & x_ND.isfinite().all(1)
        x_ND, q_ND, codes_NGR = x_ND[kept_N], q_ND[kept_N], codes_NGR[kept_N]
    if sizes is None and table is not None:
        sizes = torch.full((groups, levels), table.shape[-2])
    counts = [[_counts(codes_NGR[:, g, r], sizes, g, r) for r in range(levels)] for g in range(groups)]
    variance = float(_covariance(x_ND).diagonal().sum()) if len(x_ND) else None
    error = float((x_ND.float() - q_ND.float()).square().sum(dtype=torch.float64)) / max(len(x_ND), 1)
    parts = groups if groups and x.shape[-1] % groups == 0 else 1
    return Health(
        vectors=len(x_ND),
        usage=[[usage(n_K) if sizes is not None and n_K.any() else None for n_K in row] for row in counts],
        perplexity=[[perplexity(n_K) if n_K.any() else None for n_K in row] for row in counts],
        effective_rank_codes=_ranks(q_ND, parts),
        effective_rank_input=_ranks(x_ND, parts),
        crowding=None if table is None or sizes is None else _crowding(table, sizes),
        split_error=error / variance if variance else None,
        variance=variance,
    )


def usage(counts_K: Tensor) -> float:
    """The share of codes that occur in the counts.

    Example:
        >>> usage(torch.tensor([5, 0, 1, 0]))
        0.5
    """
    return float((counts_K > 0).double().mean()) if len(counts_K) else 0.0


def perplexity(counts_K: Tensor) -> float:
    """exp(entropy) of the code counts: K for a uniform distribution, 1 for a single code, 0 for no codes.

    Example:
        >>> perplexity(torch.tensor([7, 0, 0]))
        1.0
    """
    hits = counts_K[counts_K > 0].double()
    return float(torch.special.entr(hits / hits.sum()).sum().exp()) if len(hits) else 0.0


def effective_rank(x_ND: Tensor, weights_N: Tensor | None = None) -> float:
    """Effective rank of vectors: exp(H(s^2 / sum s^2)), with s the singular values of the centered matrix.

    Args:
        x_ND: the vectors.
        weights_N: weight of each vector; default: ``None``, 1.

    Returns:
        From 1 to D; 0 if all vectors are equal.

    Example:
        >>> round(effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 6)
        2.0
    """
    return perplexity(torch.linalg.eigvalsh(_covariance(x_ND, weights_N)).clamp(min=0))


def _ranks(x_ND: Tensor, parts: int) -> list[float | None]:
    return [effective_rank(part) if len(part) else None for part in x_ND.chunk(parts, 1)]


def _counts(codes_N: Tensor, sizes: Tensor | None, group: int, level: int) -> Tensor:
    """The number of occurrences of each code of a codebook."""
    size = 0 if sizes is None else int(sizes[group, level])
    return torch.bincount(codes_N[codes_N >= 0], minlength=size)


def _covariance(x_ND: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Scatter matrix in float64 around the mean; raw second moments of vectors far from 0 would cancel."""
    weights_N1 = (x_ND.new_ones(len(x_ND)) if weights_N is None else weights_N).double()[:, None]
    total = weights_N1.sum().clamp(min=torch.finfo(torch.float64).tiny)
    chunks = list(zip(x_ND.split(CHUNK), weights_N1.split(CHUNK), strict=True))
    zero_D = torch.zeros(x_ND.shape[-1], dtype=torch.float64, device=x_ND.device)
    mean_D = sum(((w_n1 * x_nD).sum(0) for x_nD, w_n1 in chunks), zero_D) / total
    covariance_DD = zero_D.new_zeros(len(mean_D), len(mean_D))
    for x_nD, w_n1 in chunks:
        centred_nD = x_nD - mean_D
        covariance_DD.addmm_((w_n1 * centred_nD).T, centred_nD)
    covariance_DD /= total
    # For equal vectors, the rounding error of the mean is not variance.
    noise = (10 * torch.finfo(torch.float64).eps) ** 2 * mean_D.square().sum()
    return covariance_DD.where(covariance_DD.trace() > noise, 0)


def _crowding(table: Tensor, sizes: Tensor) -> list[list[float | None]]:
    """For each codebook, the share of rows with another row close by."""
    return [[_crowded(table[g, r, : int(sizes[g, r])]) for r in range(table.shape[1])] for g in range(table.shape[0])]


def _crowded(table_KC: Tensor) -> float | None:
    if len(table_KC) < 2:
        return None
    every = math.ceil(len(table_KC) / PROBED)
    table_KC = table_KC.float()
    probed_PC = table_KC[::every]
    median = torch.pdist(probed_PC).median()
    nearest = []
    # Use differences instead of products, so that equal rows have a distance of exactly 0.
    for start in range(0, len(probed_PC), 64):
        near_pK = torch.cdist(probed_PC[start : start + 64], table_KC, compute_mode="donot_use_mm_for_euclid_dist")
        own_p = torch.arange(start, start + len(near_pK), device=near_pK.device) * every
        nearest.append(near_pK.scatter_(1, own_p[:, None], math.inf).amin(1))
    return float((torch.cat(nearest) <= CLOSE * median).double().mean())

"""Codebook diagnosis: distinguishes wasted codes (token collapse) from low-rank vectors (embedding collapse).

Shapes: N vectors, C width of the vectors and of a codebook's rows, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pondera.core.errors import UserError
from pondera.methods.quantize.common.health import effective_rank, perplexity, usage
from pondera.methods.quantize.common.kmeans import kmeans
from pondera.methods.quantize.common.nearest import nearest

# These thresholds are from the collapse study (docs/results/collapse.md). They separate the codebooks that a reader
# calls collapsed from the others; each docstring gives the nearest values on both sides. The test of the collapse study
# checks them.
WORSE = 1.5
"""Codes are wasted if the error is more than this multiple of the k-means error (in the study 1.9 or more) ..."""
MATTERS = 0.05
"""... and exceeds the k-means error by more than this share of the variance (0.07 or more; up to 0.03 if each of 64
clusters has a code, which k-means would split further without benefit; at 0.035 four clusters shared codes, which this
allows) ..."""
FEWER = 0.6
"""... and the perplexity is below this share of the k-means perplexity (0.46 or less; 0.71 or more if codes are used
evenly but placed badly)."""
NARROW = 0.3
"""Embeddings are collapsed if their effective rank is below this share of its possible value (0.23 or less with an
encoder of width 4, or with an encoder ruined by quantization; otherwise 0.33 or more)."""
ENOUGH = 4
"""Minimum number of vectors per code for a diagnosis: half of them fit the k-means codebook, half evaluate."""
KINDS = ("healthy", "token collapse", "embedding collapse", "both")


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one codebook.

    Args:
        kind: one of `KINDS`.
        why: the evidence, in a few sentences.
        cure: recommendations, the most effective first; empty if healthy.
        vectors, codes, width: number of vectors, number of codes, width of vectors.
        usage, perplexity, split_error: of the codebook on vectors that k-means did not see.
        reachable_perplexity, reachable_error: of a k-means codebook of the same size on the same vectors.
        effective_rank_codes, effective_rank_input: effective rank of the codes, weighted by use, and of the vectors.
    """

    kind: str
    why: str
    cure: str
    vectors: int
    codes: int
    width: int
    usage: float
    perplexity: float
    split_error: float
    reachable_perplexity: float
    reachable_error: float
    effective_rank_codes: float
    effective_rank_input: float

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self)


@torch.no_grad()
def diagnose(x_NC: Tensor, table_KC: Tensor, rank: float | None = None, seed: int = 0) -> Diagnosis:
    """Compares a codebook with a k-means codebook of the same size on the same vectors.

    A low usage alone is no failure: data with 64 clusters needs only 64 of 256 codes. Therefore k-means fits a codebook
    to one half of the vectors, and both codebooks are measured on the other half.

    Source: the two failures are those of arXiv 2411.16550 (token collapse, embedding collapse) and 2603.17052; the
    thresholds are ours.
    Cost: k-means: 10 x N x K x C multiplications.
    When not to use it: on fewer than a few thousand vectors, or only on vectors that the codebook was trained on.
    Resolved: the papers give no thresholds. `WORSE`, `MATTERS`, `FEWER` and `NARROW` are calibrated on trained
    codebooks.

    Args:
        x_NC: vectors, from text or images outside the training data.
        table_KC: the codebook.
        rank: effective rank of the same vectors before quantization started; default: ``None``, compare with C.
        seed: seed of the split and of k-means.

    Raises:
        UserError: too few vectors, or different widths.

    Example:
        >>> x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
        >>> diagnose(x, x[:64]).kind, diagnose(x, 100 + x[:64]).kind
        ('healthy', 'token collapse')
    """
    count, width, codes = len(x_NC), x_NC.shape[-1], len(table_KC)
    if width != table_KC.shape[-1]:
        raise UserError(
            f"latents are {width} wide and the codebook's rows {table_KC.shape[-1]}; give two of the same width"
        )
    if count < ENOUGH * codes:
        raise UserError(
            f"{count} vectors are too few to judge {codes} codes; give {ENOUGH * codes} or more, e.g. a longer text"
        )
    draw = torch.Generator().manual_seed(seed)
    x_NC, table_KC = x_NC.float().cpu(), table_KC.float().cpu()
    order_N = torch.randperm(count, generator=draw)
    fit_NC, test_NC = x_NC[order_N[: count // 2]], x_NC[order_N[count // 2 :]]
    best_KC, _ = kmeans(fit_NC, codes, draw)
    used, reachable = _measure(test_NC, table_KC), _measure(test_NC, best_KC)
    numbers = {
        "usage": used["usage"],
        "perplexity": used["perplexity"],
        "split_error": used["error"],
        "reachable_perplexity": reachable["perplexity"],
        "reachable_error": reachable["error"],
        "effective_rank_codes": used["rank"],
        "effective_rank_input": effective_rank(test_NC),
    }
    yardstick = rank if rank is not None else float(width)
    kind = judge(numbers, yardstick)
    return Diagnosis(
        kind=kind,
        why=_why(numbers, yardstick, codes, rank is not None),
        cure=" ".join(_cures(kind)),
        vectors=len(test_NC),
        codes=codes,
        width=width,
        **numbers,
    )


def judge(numbers: Mapping[str, float], yardstick: float) -> str:
    """The verdict from the measured numbers.

    Args:
        numbers: fields of a `Diagnosis` by name: perplexity and error of the codebook and of k-means, effective rank of
            the vectors.
        yardstick: effective rank of the vectors before quantization, or its maximum.

    Returns:
        One of `KINDS`.

    Example:
        >>> sick = {"split_error": 0.6, "reachable_error": 0.1, "perplexity": 15, "reachable_perplexity": 100}
        >>> judge(sick | {"effective_rank_input": 9.0}, 16), judge(sick | {"effective_rank_input": 2.0}, 16)
        ('token collapse', 'both')
    """
    reachable = numbers["reachable_error"]
    worse = numbers["split_error"] > max(WORSE * reachable, reachable + MATTERS)
    wasted = worse and numbers["perplexity"] < FEWER * numbers["reachable_perplexity"]
    return KINDS[wasted + 2 * (numbers["effective_rank_input"] < NARROW * yardstick)]


def _measure(x_NC: Tensor, table_KC: Tensor) -> dict[str, float]:
    """Measures a codebook on vectors."""
    code_N = nearest(x_NC, table_KC)
    counts_K = torch.bincount(code_N, minlength=len(table_KC))
    variance = float((x_NC - x_NC.mean(0)).square().sum(1).mean())
    error = float((x_NC - table_KC[code_N]).square().sum(1).mean())
    return {
        "usage": usage(counts_K),
        "perplexity": perplexity(counts_K),
        "rank": effective_rank(table_KC, counts_K.double()),
        "error": error / variance if variance else float(error > 0),
    }


def _why(numbers: Mapping[str, float], yardstick: float, codes: int, before: bool) -> str:
    """The evidence as text."""
    against = f"{yardstick:.1f} before quantization started" if before else f"a maximum of {yardstick:.0f}"
    return (
        f"{numbers['usage']:.0%} of {codes} codes are used, with a perplexity of {numbers['perplexity']:.1f}; k-means "
        f"reaches {numbers['reachable_perplexity']:.1f}. The quantization error is {numbers['split_error']:.3f} of the "
        f"variance, with k-means {numbers['reachable_error']:.3f}. The vectors have an effective rank of "
        f"{numbers['effective_rank_input']:.1f}, compared with {against}."
    )


def _cures(kind: str) -> list[str]:
    """Recommendations, the most effective first."""
    wasted, narrow = kind in ("token collapse", "both"), kind in ("embedding collapse", "both")
    cures = []
    if wasted or narrow:
        cures.append("Train without the codebook first (start_step), then initialize it by k-means (init='kmeans').")
    if wasted:
        cures.append("Keep codes alive with SimVQ or respawn=0.01.")
    if narrow:
        cures.append(
            "Train the model without a codebook for comparison: if its vectors have the same effective rank, the "
            "encoder is too narrow, and no codebook helps."
        )
    return cures

"""What is wrong with a codebook, in words: are its codes wasted, or is there nothing for them to tell apart?

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

# Set by the collapse study (docs/results/collapse.md), between what a reader would call collapsed there and what not; the
# values on both sides stand beside each. tests/quantize/test_collapse_study.py holds the verdicts to the reader's.
WORSE = 1.5
"""Codes are wasted where the error is so many times that of k-means with as many codes (in the study 1.9 or more) ..."""
MATTERS = 0.05
"""... and above it by so much of the variance (0.07 or more; up to 0.03 where each of 64 clusters has a code, which k-means
would cut further, to no use; at 0.035 four clusters shared codes, which this lets pass) ..."""
FEWER = 0.6
"""... and the perplexity less than this share of its perplexity (0.46 or less; where codes are used evenly but not well
placed, 0.71 or more)."""
NARROW = 0.3
"""Embeddings are collapsed where they vary in less than this share of the directions that they have (0.23 or less with an
encoder of width 4, or with one that quantization ruined; else 0.33 or more)."""
ENOUGH = 4
"""Vectors per code that a diagnosis asks for, at least: half of them fit the k-means codebook, half judge."""
KINDS = ("healthy", "token collapse", "embedding collapse", "both")


@dataclass(frozen=True)
class Diagnosis:
    """One codebook.

    Args:
        kind: one of `KINDS`.
        why: the evidence, in a sentence or two.
        cure: what to do, in order of value; empty if healthy.
        vectors, codes, width: what was looked at.
        usage, perplexity, split_error: of the codebook on vectors that k-means did not see.
        reachable_perplexity, reachable_error: of a k-means codebook with as many codes on the same vectors.
        effective_rank_codes, effective_rank_input: directions that the codes as used, and the vectors, vary in.
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
        """The same in the types that JSON has."""
        return asdict(self)


@torch.no_grad()
def diagnose(x_NC: Tensor, table_KC: Tensor, rank: float | None = None, seed: int = 0) -> Diagnosis:
    """Holds a codebook against the best that as many codes could do on the same vectors.

    A low usage alone says nothing: data with 64 clusters needs 64 of 256 codes. So one half of the vectors fits a codebook
    by k-means, and both codebooks are measured on the other half.

    Source: the two failures are those of arXiv 2411.16550 (tokens collapse, embeddings collapse) and 2603.17052; the
    yardsticks are ours.
    Cost: k-means: 10 x N x K x C multiplications.
    When not to use it: on less than a few thousand vectors, or vectors that the codebook was trained on alone.
    Resolved: the papers give no thresholds. `WORSE`, `MATTERS`, `FEWER` and `NARROW` are set by trained codebooks.

    Args:
        x_NC: vectors, from text or images that training has not seen.
        table_KC: the codebook.
        rank: effective rank of the same vectors before quantization began, if it is known; none: C is the yardstick.
        seed: of the split and of k-means.

    Raises:
        UserError: too few vectors, or widths that differ.

    Example:
        >>> x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
        >>> diagnose(x, x[:64]).kind, diagnose(x, 100 + x[:64]).kind
        ('healthy', 'token collapse')
    """
    count, width, codes = len(x_NC), x_NC.shape[-1], len(table_KC)
    if width != table_KC.shape[-1]:
        raise UserError(
            f"latents are {width} wide and the codebook's rows {table_KC.shape[-1]}; give two that belong together"
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
    """The verdict that numbers come to.

    Args:
        numbers: those of a `Diagnosis`, by their names: perplexity and error of the codebook and of k-means, effective rank
            of the vectors.
        yardstick: effective rank that the vectors had before quantization, or could have.

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
    """How a codebook does on vectors."""
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
    """The evidence."""
    against = f"the {yardstick:.1f} before quantization began" if before else f"the {yardstick:.0f} that they have"
    return (
        f"{numbers['usage']:.0%} of {codes} codes are used, as evenly as {numbers['perplexity']:.1f} of them would be; "
        f"k-means reaches {numbers['reachable_perplexity']:.1f}. What is lost is {numbers['split_error']:.3f} of the "
        f"variance, with k-means {numbers['reachable_error']:.3f}. The vectors vary in "
        f"{numbers['effective_rank_input']:.1f} directions of {against}."
    )


def _cures(kind: str) -> list[str]:
    """What helps, the most valuable first."""
    wasted, narrow = kind in ("token collapse", "both"), kind in ("embedding collapse", "both")
    cures = []
    if wasted or narrow:
        cures.append("Train without the codebook first (start_step), then start it by k-means (start='kmeans').")
    if wasted:
        cures.append("Keep codes alive with SimVQ, or respawn=0.01.")
    if narrow:
        cures.append(
            "Check the model without a codebook: if its vectors vary in as few directions, it is the encoder that is too "
            "narrow, and no codebook helps."
        )
    return cures

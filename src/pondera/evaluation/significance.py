"""Significance of the difference between two variants, and the sentences that report it.

The terminal and the report use the same rule. Runs with the same seed see the same windows in the same order, so variants
are compared seed by seed. A difference is significant if the two-sided 95 % Student t interval of its mean excludes zero.
"""

from __future__ import annotations

import bisect
import math
import statistics
from dataclasses import dataclass

from pondera.core.format import Point, human

PRICES = {
    "inference_flops_per_token": "inference FLOPs per token",
    "kv_bytes_per_token": "KV bytes per token",
    "train_flops": "training FLOPs",
}
T95 = {
    **{1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26},
    **{10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04, 60: 2.00},
}
"""Student's t by degrees of freedom. Between two entries, the earlier one is used: it gives the wider interval."""


@dataclass(frozen=True)
class Gap:
    """The difference between the scores of two variants.

    Args:
        mean: the mean difference; negative if the first score is lower.
        margin: half the width of its 95 % interval; `None` if there is only one seed.
        seeds: the number of seeds, as text.
        how: ``"paired"``, or why the seeds are not paired, as text.
    """

    mean: float
    margin: float | None
    seeds: str
    how: str

    @property
    def clear(self) -> bool:
        """Whether the difference is significant."""
        return self.margin is not None and abs(self.mean) > self.margin

    @property
    def doubt(self) -> str:
        """The reason to doubt the difference; empty if it is significant."""
        if self.margin is None:
            return "one seed: significance unknown"
        return "" if self.clear else "not significant"


def gap(scores: dict[int, float], others: dict[int, float]) -> Gap:
    """The difference `scores` minus `others`: paired if they share at least two seeds, otherwise Welch's interval.

    Args:
        scores: scores by seed.
        others: scores of the other variant by seed.

    Example:
        >>> gap({0: 1.90, 1: 1.95, 2: 1.93}, {0: 2.00, 1: 2.04, 2: 2.03}).clear
        True
        >>> gap({0: 1.90, 1: 1.95}, {0: 2.00, 1: 2.04}).how
        'paired'
    """
    shared = [seed for seed in scores if seed in others]
    if len(shared) > 1:
        differences = [scores[seed] - others[seed] for seed in shared]
        error = statistics.stdev(differences) / math.sqrt(len(shared))
        return Gap(statistics.fmean(differences), t95(len(shared) - 1) * error, f"{len(shared)} seeds", "paired")
    mean = statistics.fmean(scores.values()) - statistics.fmean(others.values())
    counts = len(scores), len(others)
    how = f"unpaired, with {'one seed' if shared else 'no seed'} in common"
    if min(counts) < 2:
        return Gap(mean, None, "one seed", how)
    errors = [statistics.variance(side.values()) / len(side) for side in (scores, others)]
    total = sum(errors)
    parts = sum(error**2 / (count - 1) for error, count in zip(errors, counts, strict=True))
    freedom = total**2 / parts if parts else 1.0
    return Gap(mean, t95(freedom) * math.sqrt(total), f"{counts[0]} and {counts[1]} seeds", how)


def t95(freedom: float) -> float:
    """Half the width of a two-sided 95 % interval, in standard errors."""
    return T95[max(known for known in T95 if known <= freedom + 1e-9)]


def sentence(name: str, other: str, difference: Gap, score: str) -> str:
    """A difference as a sentence.

    Example:
        >>> sentence("deep", "plain", gap({0: 1.90, 1: 1.95, 2: 1.93}, {0: 2.00, 1: 2.04, 2: 2.03}), "bits per byte")
        'deep is 0.097 bits per byte below plain (95 % CI ± 0.014, paired, 3 seeds: significant).'
        >>> sentence("deep", "plain", gap({0: 1.90}, {0: 2.00}), "bits per byte")
        'deep is 0.100 bits per byte below plain (one seed: significance unknown).'
    """
    statement = f"{name} is {abs(difference.mean):.3f} {score} {'below' if difference.mean < 0 else 'above'} {other}"
    if difference.margin is None:
        return f"{statement} ({difference.doubt})."
    verdict = difference.doubt or "significant"
    return f"{statement} (95 % CI ± {difference.margin:.3f}, {difference.how}, {difference.seeds}: {verdict})."


@dataclass
class Entry:
    """One variant: final scores by seed (lower is better), mean costs, and the mean (training FLOPs, score) curve."""

    name: str
    scores: dict[int, float]
    prices: dict[str, float]
    curve: list[Point]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values())

    @property
    def price(self) -> float:
        return self.prices["inference_flops_per_token"]


def sentences(entries: list[Entry], score: str) -> list[str]:
    """The headline of a comparison, then the sentences that qualify it.

    Args:
        entries: the variants with at least one finished run.
        score: the score's name, e.g. ``"bits per byte"``.
    """
    if not entries:
        return ["No run has finished yet."]
    best, *others = sorted(entries, key=lambda entry: entry.mean)
    if not others:
        return [f"{best.name} reaches {best.mean:.3f} {score}.", *_alone(best)]
    headline = _first(best, others[0], score)
    priced = [entry for entry in entries if math.isfinite(entry.price)]
    if best not in priced:
        return headline
    cheapest = min(priced, key=lambda entry: entry.price)
    if best.price <= cheapest.price:
        return [*headline, "No variant here costs less per token."]
    return [*headline, *_price(best, cheapest, score), *_equal_compute(best, cheapest, score)]


def _alone(entry: Entry) -> list[str]:
    if len(entry.scores) < 2:
        return ["One seed: the standard deviation is unknown."]
    spread = statistics.stdev(entry.scores.values())
    return [f"Over {len(entry.scores)} seeds the standard deviation is {spread:.4f}."]


def _first(best: Entry, second: Entry, score: str) -> list[str]:
    difference = gap(best.scores, second.scores)
    why = sentence(best.name, second.name, difference, score)
    if difference.margin is None:
        return [f"{best.name} is ahead: {best.mean:.3f} {score}.", why]
    if difference.clear and difference.mean < 0:
        return [f"{best.name} is best: {best.mean:.3f} {score}.", why]
    return [
        f"{best.name} and {second.name} do not differ significantly: {best.mean:.3f} and {second.mean:.3f} {score}.",
        why,
    ]


def _price(best: Entry, cheapest: Entry, score: str) -> list[str]:
    ratios = {name: best.prices[key] / cheapest.prices[key] for key, name in PRICES.items() if cheapest.prices[key]}
    spent = [f"{ratio:.2g}× the {name}" for name, ratio in ratios.items() if math.isfinite(ratio)]
    if not spent:
        return []
    *firsts, last = spent
    listing = f"{', '.join(firsts)} and {last}" if firsts else last
    doubt = gap(best.scores, cheapest.scores).doubt
    gain = f"{cheapest.mean - best.mean:.3f} {score} less than {cheapest.name}{f' ({doubt})' if doubt else ''}"
    return [f"For {gain}, {best.name} spends {listing}."]


def _equal_compute(best: Entry, cheapest: Entry, score: str) -> list[str]:
    """Compares the two at the training FLOPs that both reached, if one spent at least 5 % more."""
    spent = [entry.prices["train_flops"] for entry in (best, cheapest)]
    if not all(map(math.isfinite, spent)) or max(spent) < 1.05 * min(spent):
        return []
    ours, theirs = (read_off(entry.curve, min(spent)) for entry in (best, cheapest))
    if ours is None or theirs is None:
        return []
    side = "ahead" if ours < theirs else "behind"
    at = f"{human(min(spent))} FLOPs, interpolated on the curves; the costlier run is then still mid-schedule"
    return [f"At equal training compute ({at}) {best.name} is {abs(ours - theirs):.3f} {side}."]


def read_off(curve: list[Point], x: float) -> float | None:
    """A curve's value at `x`, interpolated linearly in log x; `None` outside the curve."""
    xs = [at for at, _ in curve]
    if not xs or xs[0] <= 0 or not xs[0] <= x <= xs[-1] * 1.001:
        return None
    right = min(bisect.bisect_left(xs, x), len(xs) - 1)
    (x0, y0), (x1, y1) = curve[max(0, right - 1)], curve[right]
    return y1 if x1 == x0 else y0 + (y1 - y0) * (math.log(min(x, x1)) - math.log(x0)) / (math.log(x1) - math.log(x0))

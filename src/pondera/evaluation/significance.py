"""Significance of the difference between two variants, and the sentences that report it.

The terminal and the report use the same rule. Runs with the same seed see the same windows in the same order, so variants
are compared seed by seed. The interval that is printed is the two-sided 95 % Student t interval of the mean difference. Among
several differences one may look large by chance. So a difference is significant if an interval excludes zero whose level is
corrected for their number (Bonferroni): with 4 differences it is 1 - 0.05 / 4, which is 98.75 %.
"""

from __future__ import annotations

import bisect
import math
import statistics
from dataclasses import dataclass

from pondera.core.format import Point, human
from pondera.evaluation.student_t import half_width

PRICES = {
    "inference_flops_per_token": "inference FLOPs per token",
    "kv_bytes_per_token": "KV bytes per token",
    "train_flops": "training FLOPs",
}
ERROR = 0.05
"""The chance of an interval to miss the true difference; with several differences, the chance that any of them does."""


@dataclass(frozen=True)
class Gap:
    """The difference between the scores of two variants.

    Args:
        mean: the mean difference; negative if the first score is lower.
        margin: half the width of its 95 % interval; `None` if there is only one seed.
        corrected: half the width of its interval after correction for all comparisons; `None` if there is only one seed.
        seeds: the number of seeds, as text.
        how: ``"paired"``, or why the seeds are not paired, as text.
        comparisons: the number of differences that are looked at, with this one.
    """

    mean: float
    margin: float | None
    corrected: float | None
    seeds: str
    how: str
    comparisons: int = 1

    @property
    def clear(self) -> bool:
        """Whether the difference is significant after correction."""
        return self.corrected is not None and abs(self.mean) > self.corrected

    @property
    def doubt(self) -> str:
        """The reason to doubt the difference; empty if it is significant after correction."""
        if self.margin is None:
            return "one seed: significance unknown"
        return "" if self.clear else self.judged

    @property
    def judged(self) -> str:
        """The significance in words, without and with correction."""
        after = f"after correction for {self.comparisons} comparisons"
        if self.clear:
            return f"significant, also {after}" if self.comparisons > 1 else "significant"
        alone = self.margin is not None and abs(self.mean) > self.margin
        return f"significant alone, but not {after}" if alone else "not significant"


def gap(scores: dict[int, float], others: dict[int, float], comparisons: int = 1) -> Gap:
    """The difference `scores` minus `others`: paired if they share at least two seeds, otherwise Welch's interval.

    Args:
        scores: scores by seed.
        others: scores of the other variant by seed.
        comparisons: the number of differences that are looked at together.

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
        margins = _margins(error, len(shared) - 1, comparisons)
        return Gap(statistics.fmean(differences), *margins, f"{len(shared)} seeds", "paired", comparisons)
    mean = statistics.fmean(scores.values()) - statistics.fmean(others.values())
    counts = len(scores), len(others)
    how = f"unpaired, with {'one seed' if shared else 'no seed'} in common"
    if min(counts) < 2:
        return Gap(mean, None, None, "one seed", how, comparisons)
    errors = [statistics.variance(side.values()) / len(side) for side in (scores, others)]
    total = sum(errors)
    parts = sum(error**2 / (count - 1) for error, count in zip(errors, counts, strict=True))
    freedom = total**2 / parts if parts else 1.0
    margins = _margins(math.sqrt(total), freedom, comparisons)
    return Gap(mean, *margins, f"{counts[0]} and {counts[1]} seeds", how, comparisons)


def _margins(error: float, freedom: float, comparisons: int) -> tuple[float, float]:
    """Half the widths of the 95 % interval and of the corrected one, from the standard error."""
    return half_width(1 - ERROR, freedom) * error, half_width(1 - ERROR / comparisons, freedom) * error


def looked_at(comparisons: int) -> str:
    """How many differences there are and what the correction means, for a reader of their sentences.

    Example:
        >>> looked_at(4)[:48]
        '4 differences were looked at. "After correction"'
    """
    return (
        f'{comparisons} differences were looked at. "After correction": the chance that any of them is called significant '
        f"although the variants do not differ is at most {100 * ERROR:.0f} % (Bonferroni)."
    )


def sentence(name: str, other: str, difference: Gap, score: str) -> str:
    """A difference as a sentence.

    Example:
        >>> sentence("deep", "plain", gap({0: 1.90, 1: 1.95, 2: 1.93}, {0: 2.00, 1: 2.04, 2: 2.03}), "bits per byte")
        'deep is 0.097 bits per byte below plain (95 % CI ± 0.014, paired, 3 seeds: significant).'
        >>> found = gap({0: 1.90, 1: 1.95, 2: 1.93}, {0: 2.00, 1: 2.04, 2: 2.03}, comparisons=4)
        >>> sentence("deep", "plain", found, "loss").partition("seeds: ")[2]
        'significant, also after correction for 4 comparisons).'
        >>> sentence("deep", "plain", gap({0: 1.90}, {0: 2.00}), "bits per byte")
        'deep is 0.100 bits per byte below plain (one seed: significance unknown).'
    """
    statement = f"{name} is {abs(difference.mean):.3f} {score} {'below' if difference.mean < 0 else 'above'} {other}"
    if difference.margin is None:
        return f"{statement} ({difference.doubt})."
    about = f"95 % CI ± {difference.margin:.3f}, {difference.how}, {difference.seeds}: {difference.judged}"
    return f"{statement} ({about})."


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


def sentences(entries: list[Entry], score: str, comparisons: int | None = None) -> list[str]:
    """The headline of a comparison, then the sentences that qualify it.

    Args:
        entries: the variants with at least one finished run.
        score: the score's name, e.g. ``"bits per byte"``.
        comparisons: the number of differences for which significance is corrected (default: `None`, those named here).
    """
    if not entries:
        return ["No run has finished yet."]
    best, *others = sorted(entries, key=lambda entry: entry.mean)
    if not others:
        return [f"{best.name} reaches {best.mean:.3f} {score}.", *_alone(best)]
    priced = [entry for entry in entries if math.isfinite(entry.price)]
    cheapest = min(priced, key=lambda entry: entry.price) if best in priced else None
    named = {entry.name for entry in (others[0], cheapest) if entry is not None and entry is not best}
    comparisons = comparisons or len(named)
    said = _first(best, others[0], score, comparisons)
    if cheapest is not None and best.price <= cheapest.price:
        said.append("No variant here costs less per token.")
    elif cheapest is not None:
        said += [*_price(best, cheapest, score, comparisons), *_equal_compute(best, cheapest, score)]
    known = min(len(best.scores), len(others[0].scores)) > 1
    return [*said, looked_at(comparisons)] if comparisons > 1 and known else said


def _alone(entry: Entry) -> list[str]:
    if len(entry.scores) < 2:
        return ["One seed: the standard deviation is unknown."]
    spread = statistics.stdev(entry.scores.values())
    return [f"Over {len(entry.scores)} seeds the standard deviation is {spread:.4f}."]


def _first(best: Entry, second: Entry, score: str, comparisons: int) -> list[str]:
    difference = gap(best.scores, second.scores, comparisons)
    why = sentence(best.name, second.name, difference, score)
    if difference.margin is None:
        return [f"{best.name} is ahead: {best.mean:.3f} {score}.", why]
    if difference.clear and difference.mean < 0:
        return [f"{best.name} is best: {best.mean:.3f} {score}.", why]
    return [
        f"{best.name} and {second.name} do not differ significantly: {best.mean:.3f} and {second.mean:.3f} {score}.",
        why,
    ]


def _price(best: Entry, cheapest: Entry, score: str, comparisons: int) -> list[str]:
    ratios = {name: best.prices[key] / cheapest.prices[key] for key, name in PRICES.items() if cheapest.prices[key]}
    spent = [f"{ratio:.2g}× the {name}" for name, ratio in ratios.items() if math.isfinite(ratio)]
    if not spent:
        return []
    *firsts, last = spent
    listing = f"{', '.join(firsts)} and {last}" if firsts else last
    doubt = gap(best.scores, cheapest.scores, comparisons).doubt
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

"""What a comparison says, in sentences: the best, whether seeds explain the gap, and what the gain cost."""

from __future__ import annotations

import bisect
import math
import statistics
from dataclasses import dataclass

from pondera.jobs.chart import Point, human

PRICES = {
    "inference_flops_per_token": "inference FLOPs per token",
    "kv_bytes_per_token": "KV bytes per token",
    "train_flops": "training FLOPs",
}


@dataclass
class Entry:
    """One recipe: its final scores (one per seed, low is good), mean prices, and mean (training FLOPs, score) curve."""

    name: str
    scores: list[float]
    prices: dict[str, float]
    curve: list[Point]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def price(self) -> float:
        return self.prices["inference_flops_per_token"]


def sentences(entries: list[Entry], score: str) -> list[str]:
    """The headline, then what must be known to read it rightly.

    Args:
        entries: the recipes with at least one finished run.
        score: the score's name, e.g. ``"bits per byte"``.
    """
    if not entries:
        return ["No run has finished yet."]
    best, *others = sorted(entries, key=lambda entry: entry.mean)
    if not others:
        return [f"{best.name} reaches {best.mean:.3f} {score}.", *_alone(best)]
    second = others[0]
    said = _first(best, second, score)
    priced = [entry for entry in entries if math.isfinite(entry.price)]
    if best not in priced:
        return said
    cheapest = min(priced, key=lambda entry: entry.price)
    if best.price <= cheapest.price:
        return [*said, "No recipe here is cheaper per token."]
    return [*said, *_price(best, cheapest, score), *_equal_compute(best, cheapest, score)]


def _alone(entry: Entry) -> list[str]:
    if len(entry.scores) < 2:
        return ["One seed: its spread is unknown."]
    return [f"Over {len(entry.scores)} seeds the standard deviation is {statistics.stdev(entry.scores):.4f}."]


def _first(best: Entry, second: Entry, score: str) -> list[str]:
    gap = second.mean - best.mean
    found = f"{best.mean:.3f} {score}, {gap:.3f} below {second.name}"
    claim = f"{best.name} is best: {found}."
    if min(len(best.scores), len(second.scores)) < 2:
        return [claim, "With a single seed the spread is unknown, and a small gap may be luck."]
    spread = max(statistics.stdev(best.scores), statistics.stdev(second.scores))
    if gap <= spread:
        level = f"{best.name} and {second.name} are level: {best.mean:.3f} and {second.mean:.3f} {score}."
        return [level, f"The gap of {gap:.4f} is within one standard deviation over seeds ({spread:.4f})."]
    if not spread:
        return [claim, "The seeds agree exactly."]
    if gap <= 2 * spread:
        claim = f"{best.name} is ahead, narrowly: {found}."
    return [claim, f"The gap is {gap / spread:.1f} times the larger standard deviation over seeds ({spread:.4f})."]


def _price(best: Entry, cheapest: Entry, score: str) -> list[str]:
    ratios = {name: best.prices[key] / cheapest.prices[key] for key, name in PRICES.items() if cheapest.prices[key]}
    told = [f"{ratio:.2g}× the {name}" for name, ratio in ratios.items() if math.isfinite(ratio)]
    if not told:
        return []
    listing = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    return [f"For {cheapest.mean - best.mean:.3f} {score} less than {cheapest.name}, {best.name} spends {listing}."]


def _equal_compute(best: Entry, cheapest: Entry, score: str) -> list[str]:
    """The two at the training FLOPs that both spent, when one spent at least 5% more."""
    spent = [entry.prices["train_flops"] for entry in (best, cheapest)]
    if not all(map(math.isfinite, spent)) or max(spent) < 1.05 * min(spent):
        return []
    ours, theirs = (read_off(entry.curve, min(spent)) for entry in (best, cheapest))
    if ours is None or theirs is None:
        return []
    side = "ahead" if ours < theirs else "behind"
    at = f"{human(min(spent))} FLOPs, read off the curves, the dearer run still mid-schedule"
    return [f"At equal training compute ({at}) {best.name} is {abs(ours - theirs):.3f} {side}."]


def read_off(curve: list[Point], x: float) -> float | None:
    """A curve's value at `x`, on straight lines over log x; None outside the curve."""
    xs = [at for at, _ in curve]
    if not xs or xs[0] <= 0 or not xs[0] <= x <= xs[-1] * 1.001:
        return None
    right = min(bisect.bisect_left(xs, x), len(xs) - 1)
    (x0, y0), (x1, y1) = curve[max(0, right - 1)], curve[right]
    return y1 if x1 == x0 else y0 + (y1 - y0) * (math.log(min(x, x1)) - math.log(x0)) / (math.log(x1) - math.log(x0))

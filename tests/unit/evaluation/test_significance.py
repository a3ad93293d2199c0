"""Intervals are those of Student's t, and significance is corrected for the number of differences that are looked at."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from pondera.evaluation.significance import gap, looked_at, sentence
from pondera.evaluation.student_t import MOST_FREEDOM, half_width, probability

TABLE = {  # two-sided levels, from printed tables of Student's t
    0.90: {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 10: 1.812, 30: 1.697, 120: 1.658},
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980},
    0.98: {1: 31.821, 2: 6.965, 3: 4.541, 4: 3.747, 5: 3.365, 10: 2.764, 30: 2.457, 120: 2.358},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 10: 3.169, 30: 2.750, 120: 2.617},
    0.998: {1: 318.31, 2: 22.327, 3: 10.215, 4: 7.173, 5: 5.893, 10: 4.144, 30: 3.385, 120: 3.160},
}
SURE = {0: -0.10, 1: -0.09, 2: -0.11}  # differences to zero with standard error 0.00577: 17.3 standard errors
ZERO = dict.fromkeys(range(3), 0.0)


@pytest.mark.parametrize(
    "level, freedom, t", [(level, freedom, t) for level, row in TABLE.items() for freedom, t in row.items()]
)
def test_the_quantiles_of_printed_tables(level, freedom, t):
    # 318.31 has two digits in the tables.
    assert half_width(level, freedom) == pytest.approx(t, abs=1e-3 if t < 100 else 5e-3)


def test_closed_forms():
    """One degree of freedom is the Cauchy distribution; two have a closed form, too."""
    for level in (0.5, 0.95, 1 - 0.05 / 20):
        assert half_width(level, 1) == pytest.approx(math.tan(level * math.pi / 2), rel=1e-9)
        assert half_width(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-6)


def test_between_integers_and_beyond_the_largest():
    widths = [half_width(0.95, freedom) for freedom in (1, 1.01, 1.5, 1.99, 2, 2.5, 3, 100.5, MOST_FREEDOM)]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths)
    normal = statistics.NormalDist().inv_cdf(0.975)
    assert normal < half_width(0.95, 1e9) == half_width(0.95, MOST_FREEDOM) < 1.005 * normal
    assert probability(math.pi / 2, 1.7) == pytest.approx(1, abs=1e-3)


def test_the_interval_covers_what_it_promises():
    """Means of three normal numbers, ten thousand times: 95 % of the intervals contain the true mean."""
    draw, t = random.Random(0), half_width(0.95, 2)
    covered = 0
    for _ in range(10_000):
        seen = [draw.gauss(5, 2) for _ in range(3)]
        covered += abs(statistics.fmean(seen) - 5) <= t * statistics.stdev(seen) / math.sqrt(3)
    assert covered == pytest.approx(9_500, abs=3 * math.sqrt(10_000 * 0.95 * 0.05))


@pytest.mark.parametrize("comparisons", [1, 2, 4, 10])
def test_the_corrected_interval_has_its_level(comparisons):
    found = gap(SURE, ZERO, comparisons)
    error = 0.01 / math.sqrt(3)
    assert found.margin == pytest.approx(4.30265 * error, rel=1e-4)
    assert found.corrected == pytest.approx(half_width(1 - 0.05 / comparisons, 2) * error)
    assert (found.corrected == found.margin) == (comparisons == 1)


def test_three_answers():
    """17.3 standard errors: t is 4.3 alone, 14.1 for ten comparisons and 19.9 for twenty."""
    said = {count: sentence("a", "b", gap(SURE, ZERO, count), "loss") for count in (1, 10, 20)}
    start = "a is 0.100 loss below b (95 % CI ± 0.025, paired, 3 seeds: "
    assert said[1] == f"{start}significant)."
    assert said[10] == f"{start}significant, also after correction for 10 comparisons)."
    assert said[20] == f"{start}significant alone, but not after correction for 20 comparisons)."
    assert gap(SURE, ZERO, 10).clear and not gap(SURE, ZERO, 20).clear
    assert gap(SURE, ZERO, 10).doubt == ""
    assert gap(SURE, ZERO, 20).doubt == "significant alone, but not after correction for 20 comparisons"
    small = {0: -0.1, 1: 0.1, 2: -0.05}
    assert sentence("a", "b", gap(small, ZERO, 20), "loss").endswith(": not significant).")


def test_correction_of_unpaired_seeds_and_of_one():
    apart = gap({0: 1.0, 1: 1.1, 2: 0.9}, {3: 2.0, 4: 2.2, 5: 1.8}, 5)
    assert apart.margin is not None and apart.corrected is not None and apart.corrected > apart.margin > 0
    one = gap({0: 1.0}, {0: 2.0}, 5)
    assert one.margin is one.corrected is None and not one.clear
    assert sentence("a", "b", one, "loss") == "a is 1.000 loss below b (one seed: significance unknown)."


def test_what_the_correction_means_is_said():
    assert looked_at(4) == (
        '4 differences were looked at. "After correction": the chance that any of them is called significant although '
        "the variants do not differ is at most 5 % (Bonferroni)."
    )

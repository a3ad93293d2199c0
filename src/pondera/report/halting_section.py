"""The halting section of the report: which tokens took more passes, and how Jacobi rounds converged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pondera.core.format import Point
from pondera.report.svg import COLORS, Bars, Series, bar_chart, line_chart, swatch

SIDES = {"predicted": "the loss of the next token", "read": "the token's own loss"}


@dataclass(frozen=True)
class HaltingStats:
    """The halting statistics of one run of a variant.

    Args:
        name: the variant.
        index: selects the colour.
        seed: the seed of the run.
        trace: the result of `pondera.evaluation.trace.trace_halting`.
    """

    name: str
    index: int
    seed: int
    trace: dict[str, Any]

    @property
    def varies(self) -> bool:
        return not self.trace["constant"]

    def bars(self, key: str) -> Bars:
        """Mean passes of each group of tokens."""
        return Bars(self.name, self.index, {group["name"]: float(group["passes"]) for group in self.trace[key]})

    def histogram(self) -> Bars:
        """Share of the tokens by number of passes."""
        counts = {str(bin["passes"]): bin["tokens"] / self.trace["count"] for bin in self.trace["histogram"]}
        return Bars(self.name, self.index, counts)

    def curve(self, side: str) -> Series:
        """Mean passes by decile of the loss."""
        parts = self.trace["surprise"][side]["deciles"]
        return self._series([(part["nll"], part["passes"]) for part in parts if part["nll"] is not None])

    def rounds(self) -> Series:
        """The largest change in each Jacobi round; rounds without change are omitted, as the axis is logarithmic."""
        changes = enumerate(self.trace.get("residuals", []), start=1)
        return self._series([(float(number), change) for number, change in changes if change])

    def said(self) -> str:
        """A summary in one or two sentences."""
        prefix, count = f"seed {self.seed}, {self.trace['count']:,} held-out tokens: ", self.trace["mean"]
        if not self.varies:
            return f"{prefix}every token took {count:g} {'pass' if count == 1 else 'passes'}."
        tied = [_tie(self.trace["surprise"][side], where) for side, where in SIDES.items()]
        return f"{prefix}{count:.2f} passes on average. {' '.join(tied)}"

    def _series(self, points: list[Point]) -> Series:
        return Series(self.name, self.index, [points], points)


def halting_section(stats: Sequence[HaltingStats]) -> str:
    """The section as HTML; empty if all tokens take the same number of passes and there are no Jacobi rounds.

    Args:
        stats: at most one run per variant.
    """
    whole = [one for one in stats if _is_whole(one)]
    figures = _figures(whole)
    items = [
        f'<li class="c{one.index % COLORS}">{swatch(one.index)}<b>{escape(one.name)}</b>'
        f"<span>, {escape(one.said())}</span></li>"
        for one in whole
    ]
    items += [f"<li>{escape(one.name)}: its halting statistics are damaged.</li>" for one in stats if one not in whole]
    if not figures and len(whole) == len(stats):
        return ""
    charts = "".join(
        f'<figure class="card">{chart}<figcaption>{caption}</figcaption></figure>' for chart, caption in figures
    )
    return (
        f'<section><h2>Passes per token</h2><ul class="said">{"".join(items)}</ul><div class="charts">{charts}</div>'
        '<p class="note">One run per variant. 95 % intervals from a bootstrap over blocks of 64 tokens.</p></section>'
    )


def _is_whole(one: HaltingStats) -> bool:
    """Whether the trace is complete enough for the section."""
    try:
        _figures([one])
        one.said()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return True


def _figures(stats: Sequence[HaltingStats]) -> list[tuple[str, str]]:
    """Charts with their captions."""
    drawn: list[tuple[str, str]] = []
    if varying := [one for one in stats if one.varies]:
        x, y = "loss in nats, mean of each decile", "passes per token"
        drawn = [
            (
                bar_chart("Passes", "share of the tokens", [one.histogram() for one in varying], _percent),
                "The share of the tokens by number of passes.",
            ),
            (
                line_chart("Passes by next loss", x, y, [one.curve("predicted") for one in varying], cut=0.0, base=1.0),
                "Passes against the loss of predicting the next token.",
            ),
            (
                line_chart("Passes by own loss", x, y, [one.curve("read") for one in varying], cut=0.0, base=1.0),
                "Passes against the loss of predicting the token itself, one step earlier.",
            ),
            (
                bar_chart("Passes by word class", y, [one.bars("classes") for one in varying], "{:.2f}".format),
                "A word starts after whitespace or punctuation. Other: special tokens and parts of a character.",
            ),
            (
                bar_chart("Passes by frequency", y, [one.bars("frequency") for one in varying], "{:.2f}".format),
                "By frequency rank of the token in the training text; rank 1 is the most frequent.",
            ),
        ]
    if rounds := [series for one in stats if (series := one.rounds()).mean]:
        chart = line_chart("Convergence", "Jacobi round", "largest change", rounds, log_y=True, cut=0.0)
        drawn.append((chart, "The largest change of a thought in each Jacobi round."))
    return drawn


def _tie(correlation: dict[str, Any], where: str) -> str:
    """A correlation of passes and loss as a sentence."""
    pearson, spearman = (_with_interval(correlation[kind]) for kind in ("pearson", "spearman"))
    low, high = correlation["spearman"]["low"], correlation["spearman"]["high"]
    if low is None or high is None or low <= 0 <= high:
        return f"Passes do not correlate significantly with {where} (Pearson {pearson}; Spearman {spearman})."
    return f"Passes {'increase' if low > 0 else 'decrease'} with {where} (Pearson {pearson}; Spearman {spearman})."


def _with_interval(correlation: dict[str, Any]) -> str:
    if correlation["value"] is None:
        return "unknown"
    interval = "" if correlation["low"] is None else f", {correlation['low']:z.2f} to {correlation['high']:z.2f}"
    return f"{correlation['value']:z.2f}{interval}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}" if share >= 0.001 else "< 0.1%"

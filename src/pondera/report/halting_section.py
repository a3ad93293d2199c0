"""The part of the report on depth: which tokens got more passes, and how rounds of thinking converged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pondera.core.format import Point
from pondera.report.svg import COLORS, Bars, Series, bar_chart, line_chart, swatch

SIDES = {"predicted": "the next token is harder to predict", "read": "the token itself was surprising"}


@dataclass(frozen=True)
class HaltingStats:
    """What one run, which speaks for its arm, left about its depth.

    Args:
        name: the arm.
        index: decides its colour.
        seed: of the run.
        trace: what `pondera.evaluation.trace.trace_depths` returned.
    """

    name: str
    index: int
    seed: int
    trace: dict[str, Any]

    @property
    def varies(self) -> bool:
        return not self.trace["constant"]

    def bars(self, key: str) -> Bars:
        """The mean passes of each group of tokens."""
        return Bars(self.name, self.index, {group["name"]: float(group["passes"]) for group in self.trace[key]})

    def histogram(self) -> Bars:
        """The share of the tokens by passes."""
        counts = {str(bin["passes"]): bin["tokens"] / self.trace["count"] for bin in self.trace["histogram"]}
        return Bars(self.name, self.index, counts)

    def curve(self, side: str) -> Series:
        """Mean passes by decile of surprise."""
        parts = self.trace["surprise"][side]["deciles"]
        return self._series([(part["nll"], part["passes"]) for part in parts if part["nll"] is not None])

    def rounds(self) -> Series:
        """The largest change in each round; a round that changed nothing has no place on a logarithmic axis."""
        changes = enumerate(self.trace.get("residuals", []), start=1)
        return self._series([(float(number), change) for number, change in changes if change])

    def said(self) -> str:
        """A sentence or two."""
        said, count = f"seed {self.seed}, {self.trace['count']:,} held-out tokens: ", self.trace["mean"]
        if not self.varies:
            return f"{said}every token took {count:g} {'pass' if count == 1 else 'passes'}."
        tied = [_tie(self.trace["surprise"][side], where) for side, where in SIDES.items()]
        return f"{said}{count:.2f} passes on average. {' '.join(tied)}"

    def _series(self, points: list[Point]) -> Series:
        return Series(self.name, self.index, [points], points)


def halting_section(found: Sequence[HaltingStats]) -> str:
    """The section as HTML; empty where no depth varies and nothing converges.

    Args:
        found: at most one run per arm.
    """
    whole = [one for one in found if _is_whole(one)]
    figures = _figures(whole)
    said = [
        f'<li class="c{one.index % COLORS}">{swatch(one.index)}<b>{escape(one.name)}</b>'
        f"<span>, {escape(one.said())}</span></li>"
        for one in whole
    ]
    said += [f"<li>{escape(one.name)}: its trace of depths is damaged.</li>" for one in found if one not in whole]
    if not figures and len(whole) == len(found):
        return ""
    charts = "".join(
        f'<figure class="card">{chart}<figcaption>{caption}</figcaption></figure>' for chart, caption in figures
    )
    return (
        f'<section><h2>How deep it thought</h2><ul class="said">{"".join(said)}</ul><div class="charts">{charts}</div>'
        '<p class="note">One run per recipe. Intervals are at 95 %, by resampling stretches of 64 tokens.</p></section>'
    )


def _is_whole(one: HaltingStats) -> bool:
    """Whether all that its part of the section needs can be read."""
    try:
        _figures([one])
        one.said()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return True


def _figures(found: Sequence[HaltingStats]) -> list[tuple[str, str]]:
    """Charts with their captions."""
    drawn: list[tuple[str, str]] = []
    if varying := [one for one in found if one.varies]:
        x, y = "nats, mean of each tenth of the tokens", "passes per token"
        drawn = [
            (
                bar_chart("Passes", "share of the tokens by passes", [one.histogram() for one in varying], _percent),
                "How many passes the tokens took.",
            ),
            (
                line_chart("Depth by what comes", x, y, [one.curve("predicted") for one in varying], cut=0.0, base=1.0),
                "Against the loss on the next token, which the passes are spent on.",
            ),
            (
                line_chart("Depth by what was read", x, y, [one.curve("read") for one in varying], cut=0.0, base=1.0),
                "Against the loss that the token itself had before it was read.",
            ),
            (
                bar_chart("Depth by kind of token", y, [one.bars("classes") for one in varying], "{:.2f}".format),
                "Words begin after a blank or a sign; other: special tokens and pieces of a character.",
            ),
            (
                bar_chart("Depth by frequency", y, [one.bars("frequency") for one in varying], "{:.2f}".format),
                "By the token's place in the vocabulary, the most frequent of the training text first.",
            ),
        ]
    if rounds := [series for one in found if (series := one.rounds()).mean]:
        chart = line_chart("Rounds of thinking", "Jacobi round", "largest change", rounds, log_y=True, cut=0.0)
        drawn.append((chart, "How far the thoughts still move when they are refined together once more."))
    return drawn


def _tie(found: dict[str, Any], where: str) -> str:
    """What a correlation says of depth and surprise."""
    pearson, spearman = (_with_interval(found[kind]) for kind in ("pearson", "spearman"))
    low, high = found["spearman"]["low"], found["spearman"]["high"]
    if low is None or high is None or low <= 0 <= high:
        return f"Not clearly deeper or shallower where {where} (Pearson {pearson}; Spearman {spearman})."
    return f"{'Deeper' if low > 0 else 'Shallower'} where {where} (Pearson {pearson}; Spearman {spearman})."


def _with_interval(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "unknown"
    interval = "" if found["low"] is None else f", {found['low']:z.2f} to {found['high']:z.2f}"
    return f"{found['value']:z.2f}{interval}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}" if share >= 0.001 else "< 0.1%"

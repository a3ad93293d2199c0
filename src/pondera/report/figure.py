"""Standalone SVG files of charts, with colours, background and legend, for pages that show images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pondera.report.svg import COLORS, LETTER

ABOVE, BELOW = 44, 10  # heading and legend; margin
CHART = re.compile(r'<h3>(.*?)</h3>\s*<svg class="chart" viewBox="0 0 (\d+) (\d+)" role="img">(.*)</svg>', re.DOTALL)
RULE = re.compile(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}|[^{}@]+\{[^{}]*\}")


def page_style() -> str:
    """The CSS of the report, which all pages share."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return template.partition("<style>")[2].partition("</style>")[0]


def figure(chart: str, names: Sequence[str]) -> str:
    """An SVG document that follows the light or dark mode of the system.

    Args:
        chart: the result of a chart function of `pondera.report.svg`.
        names: the names of its series, in the order of their colours.

    Example:
        >>> from pondera.report.svg import Bars, bar_chart
        >>> svg = figure(bar_chart("Lost", "of all", [Bars("here", 0, {"a": 1.0})], str), ["here"])
        >>> svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"'), ">here</text>" in svg
        (True, True)
    """
    match = CHART.search(chart)
    assert match, "no chart"
    title, width, height, inside = match.groups()
    x, legend = 12.0, []
    for number, name in enumerate(names):
        legend.append(
            f'<rect class="fill c{number % COLORS}" x="{x:.0f}" y="26" width="11" height="11"/>'
            f'<text class="tick" x="{x + 16:.0f}" y="36">{escape(name)}</text>'
        )
        x += 34 + LETTER * len(name)
    body = "\n".join(
        [
            '<rect class="ground" width="100%" height="100%"/>',
            f'<text class="name" x="4" y="15">{title}</text>',
            *legend,
            f'<g transform="translate(0,{ABOVE})">{inside}</g>',
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {int(height) + ABOVE + BELOW}" '
        f'role="img">\n<style>\n{_rules(body)}\n.ground {{ fill: var(--card); }}\n</style>\n{body}\n</svg>\n'
    )


def _rules(body: str) -> str:
    """The CSS rules that apply to this chart."""
    used = {"chart", *" ".join(re.findall(r'class="([^"]+)"', body)).split()}
    rules = (rule.strip() for rule in RULE.findall(page_style()))
    return "\n".join(
        rule
        for rule in rules
        if rule.startswith((":root", "@media (prefers-color-scheme"))
        or used & set(re.findall(r"\.([\w-]+)", rule.partition("{")[0]))
    )

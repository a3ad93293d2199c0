"""A chart as a file: whole, offline, and with the rules for what it draws."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from pondera.report.figure import figure
from pondera.report.svg import Bars, Series, bar_chart, line_chart


def test_it_is_a_document_with_all_it_needs():
    bars = [Bars("one & all", 0, {"a": 1.0, "b": 2.0}), Bars("two", 1, {"b": 0.5})]
    svg = figure(bar_chart("Lost <here>", "of all", bars, str), [one.name for one in bars])
    root = ElementTree.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == "Lost <here>" and {"one & all", "two", "a", "b", "1.0", "2.0", "0.5"} <= set(words)
    assert "<script" not in svg and "://" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    height = float(root.attrib["viewBox"].split()[3])
    assert max(float(y) for y in re.findall(r' y="([\d.]+)"', svg)) < height
    style, drawn = svg.partition("</style>")[::2]
    for name in set(" ".join(re.findall(r'class="([^"]+)"', drawn)).split()) - {"dot"}:
        assert f".{name}" in style, name
    for variable in set(re.findall(r"var\((--[\w-]+)\)", style)):
        assert style.count(f"{variable}:") == 2, f"{variable}: light and dark"
    assert "table" not in style and ".swatch" not in style  # only what it draws with


def test_curves_are_drawn_too():
    chart = line_chart("Loss", "steps", "nats", [Series("plain", 0, [], [(1.0, 3.0), (2.0, 2.0)])])
    root = ElementTree.fromstring(figure(chart, ["plain"]))
    assert any(element.tag.endswith("clipPath") for element in root.iter())


def test_curves_may_lie_below_zero():
    points = [(-6.0, 0.0), (-4.0, 0.5), (-2.0, 1.0)]
    chart = line_chart("Read", "logSNR", "share", [Series("nearest", 0, [points], points)])
    places = [float(x) for x in re.findall(r"[ML](-?[\d.]+),[\d.]+(?=[ML\"])", chart)]
    assert len(places) >= 3 and all(0 <= x <= 400 for x in places)

"""The part of the report on depth: there when depth varies or rounds converge, and true to the trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run
from pondera.evaluation.halting_stats import halting_stats
from pondera.report.page import write_report
from pondera.report.svg import Bars, Series, bar_chart, line_chart

TITLE = "Passes per token"


def make_run(folder: Path, name: str, passes: str, residuals: tuple[float, ...] = ()) -> Path:
    """A finished run whose passes follow the loss on the next token, are drawn blindly, or are all two."""
    draw = np.random.default_rng(0)
    nll = draw.exponential(2.0, 2049)
    read, predicted = nll[:-1], nll[1:]
    taken = {
        "surprise": np.clip(np.rint(1 + predicted / 2), 1, 5),
        "chance": draw.integers(1, 4, 2048).astype(float),
        "level": np.full(2048, 2.0),
    }[passes]
    words = draw.choice(["The", " cat", "s", "\n", " 7", "."], 2048).tolist()
    found = halting_stats(words, taken, read, predicted, draw.integers(1, 3000, 2048))
    run = Run.create(folder / name, RunConfig(name=name))
    run.log(step=10, tokens=100, train_flops=1e9, loss=3.0)
    run.write_result({"loss": 3.0, "bits_per_byte": 2.0, "passes_per_token": 2.0})
    run.write_trace("sample", {"tokens": ["a", "b"], "passes": [1, 2], "nll": [1.0, 2.0]})
    run.write_trace("depths", found | ({"residuals": list(residuals)} if residuals else {}))
    return run.path


def page(runs: list[Path], out: Path) -> str:
    html = write_report(runs, out).read_text(encoding="utf-8")
    assert html.count("<section>") == html.count("</section>") and "nan" not in html
    return html


def test_depth_that_varies_is_drawn_and_told(tmp_path: Path):
    names = {"follows": "surprise", "blind": "chance", "level": "level"}
    runs = [make_run(tmp_path, name, passes) for name, passes in names.items()]
    html = page(runs, tmp_path / "report.html")
    assert TITLE in html and "://" not in html and "<script" not in html
    for title in ("Passes", "Passes by next loss", "Passes by own loss", "Passes by word class"):
        assert f"<h3>{title}</h3>" in html
    assert "Convergence" not in html
    said = dict(re.findall(r"<b>(\w+)</b><span>, (.*?)</span>", html))
    assert "Passes increase with the loss of the next token" in said["follows"]
    assert said["blind"].count("do not correlate significantly") == 2
    assert said["level"] == "seed 0, 2,048 held-out tokens: every token took 2 passes."
    trace = json.loads((runs[0] / "traces" / "depths.json").read_text())
    pearson, digits = (
        trace["surprise"]["predicted"]["pearson"],
        next(one["passes"] for one in trace["classes"] if one["name"] == "digits"),
    )
    assert f"Pearson {pearson['value']:.2f}, {pearson['low']:.2f} to {pearson['high']:.2f}" in said["follows"]
    assert f"<title>follows, digits: {digits:.2f}</title>" in html
    assert "<title>level, digits" not in html, "an arm of one depth has nothing to compare"
    assert html.count('class="card sample"') == 3, "the statistics are no sample of text"


def test_rounds_converge_on_a_page_of_their_own(tmp_path: Path):
    html = page([make_run(tmp_path, "jacobi", "level", (1.0, 0.1, 0.001, 0.0))], tmp_path / "report.html")
    assert TITLE in html and "<h3>Convergence</h3>" in html and "<h3>Passes</h3>" not in html
    chart = re.search(r"<h3>Convergence</h3>.*?</svg>", html, re.DOTALL)
    assert chart is not None and "largest change (log scale)" in chart[0]
    path = re.search(r'class="thick" d="M([^"]*)"', chart[0])
    assert path is not None
    heights = [float(point.split(",")[1]) for point in path[1].split("L")]
    assert len(heights) == 3, "nothing moved in the last round, which no logarithm can show"
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]), abs=0.2), "a decade, then two"


def test_one_depth_for_all_needs_no_section(tmp_path: Path):
    assert TITLE not in page([make_run(tmp_path, "level", "level")], tmp_path / "report.html")


@pytest.mark.parametrize(
    "damage",
    ["{}", '{"constant": false, "histogram": 3}', '{"constant": false, "count": 0, "histogram": [{"passes": 1, "tokens": 1}]}'],
)  # fmt: skip
def test_a_damaged_trace_is_named_and_the_others_are_drawn(tmp_path: Path, damage: str):
    good, bad = make_run(tmp_path, "good", "surprise"), make_run(tmp_path, "<bad>", "surprise")
    (bad / "traces" / "depths.json").write_text(damage)
    html = page([good, bad], tmp_path / "report.html")
    missing = damage == "{}"  # an empty trace is none
    assert ("&lt;bad&gt;: its halting statistics are damaged." in html) != missing
    assert "<title>good, digits" in html and "<bad>" not in html


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("T", "passes", [Bars("a", 0, {"x": 1.0, "<y>": 2.0}), Bars("b", 1, {"x": 0.0})], "{:g}".format)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    assert len(widths) == 3 and widths[0] == 0.5 * widths[2] and widths[1] == 0.0
    assert "&lt;y&gt;" in chart and "<y>" not in chart


def test_an_axis_reaches_down_to_its_base():
    points = [(1.0, 2.00), (2.0, 2.01), (3.0, 1.99)]

    def span(base: float | None) -> float:
        chart = line_chart("T", "x", "y", [Series("a", 0, [points], points)], cut=0.0, base=base)
        path = re.search(r'class="thick" d="M([^"]*)"', chart)
        assert path is not None
        heights = [float(point.split(",")[1]) for point in path[1].split("L")]
        return max(heights) - min(heights)

    assert span(1.0) < 6 < 100 < span(None), "noise of a hundredth is small where a whole pass is in view"


def test_a_logarithmic_axis_is_labelled_in_what_fits():
    points = [(1.0, 1.0), (2.0, 1e-3), (3.0, 1e-6)]
    chart = line_chart("T", "x", "y", [Series("a", 0, [points], points)], log_y=True, cut=0.0)
    ticks = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert {"1", "1e-4", "1e-6"} & set(ticks) and all(len(tick) <= 5 for tick in ticks)

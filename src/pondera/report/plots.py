"""The charts of a probe as one offline HTML page in the style of the report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pondera.core.errors import UserError
from pondera.core.run_folder import write_atomic
from pondera.methods.probe.base import Plot
from pondera.report.figure import page_style
from pondera.report.svg import COLORS, Series, line_chart, swatch


def write_plots(plots: Sequence[Plot], note: str, out: Path, title: str) -> Path:
    """Writes the page.

    Args:
        plots: the charts; each becomes a figure.
        note: the conclusion, as text above the charts.
        out: the file to write.
        title: the title of the page.

    Raises:
        UserError: `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file, e.g. {out / 'plots.html'}")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{page_style()}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(note)}</p>\n<div class="charts">\n{"".join(map(_figure, plots))}</div>\n'
        "</main>\n</body>\n</html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return out


def _figure(plot: Plot) -> str:
    """A chart with its legend."""
    names = list(plot.lines)
    series = [
        Series(name, number % COLORS, [], [(float(x), float(y)) for x, y in plot.lines[name]])
        for number, name in enumerate(names)
        if plot.lines[name]
    ]
    chart = line_chart(plot.title, plot.x_label, plot.y_label, series, log_y=plot.log_y, cut=0.0)
    legend = "".join(f"<li>{swatch(one.index)}{escape(one.name)}</li>" for one in series)
    return f'<figure class="card"><h3>{escape(plot.title)}</h3><ul class="legend">{legend}</ul>{chart}</figure>\n'

"""Line, scatter and bar charts as inline SVG, without a script and with descriptions for screen readers.

The CSS of the page sets the colours (`.c0`, `.c1`, ...). A chart is 400 units wide, about the width of a phone in pixels, so
text has its natural size on a phone, and three charts fit side by side on a desktop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from pondera.core.format import Point, human

WIDTH, HEIGHT = 400, 320
LEFT, TOP, BOTTOM = 40, 34, 46
CUT = 0.25  # the first part of a curve, whose steep start the y axis may cut off
LETTER = 7.4  # width of a letter at the label size, in the widest common font
LONGEST = 13  # maximum letters of a label; the full name is in the legend and in the hover title
MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "M-3.6,-3.6h7.2v7.2h-7.2z",  # square
    "M0,-4.8L4.6,3.4H-4.6z",  # triangle
    "M0,-5L5,0L0,5L-5,0z",  # diamond
    "M0,4.8L4.6,-3.4H-4.6z",  # triangle down
    "M-1.4,-4.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",  # plus
)
COLORS = 6
THICK, BETWEEN = 12, 9  # height of a bar, and space between two groups of bars
MOST_MARKERS = 16  # maximum per line


@dataclass
class Series:
    """The curves of one variant: its runs and their mean.

    Attributes:
        name: the label.
        index: selects colour and marker.
        runs: one list of points per run, drawn as thin lines.
        mean: the mean over the runs, drawn as a thick line.
        spread: sample standard deviation of y for each point of `mean`; `None` if unknown.
        unfinished: draw dashed lines.
    """

    name: str
    index: int
    runs: list[list[Point]]
    mean: list[Point]
    spread: list[float | None] = field(default_factory=list)
    unfinished: bool = False


@dataclass(frozen=True)
class Bars:
    """The values of one variant by category.

    Args:
        name: the variant.
        index: selects the colour.
        values: non-negative values by category.
    """

    name: str
    index: int
    values: dict[str, float]


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside the range: multiples of 1, 2, 2.5 or 5, or digits 1, 2 and 5 on a log axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                ticks = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(ticks) >= min(3, count):
                    return ticks[:: math.ceil(len(ticks) / (count + 1))]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(d for d in (1, 2, 2.5, 5, 10) if d * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) if step < 1 else index * step for index in range(first, last + 1)]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    log_x: bool = False,
    log_y: bool = False,
    cut: float = CUT,
    base: float | None = None,
) -> str:
    """A line chart: a thin line per run, a thick line for the mean, and the names at the right.

    The y axis covers the curves after their first quarter (`cut`), because a steep start would flatten the rest. It
    includes `base`, if given, so that noise does not look like a trend. On a logarithmic y axis all values must be above 0.
    """
    return _chart(title, x_label, y_label, series, log_x, True, log_y, cut, [] if base is None else [base])


def scatter_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """A scatter chart: a faint point per run, and a full point for the mean with a bar of ± one standard deviation."""
    xs = [x for one in series for x, _ in one.mean]
    return _chart(title, x_label, y_label, series, bool(xs) and max(xs) > 8 * min(xs) > 0, joined=False)


def bar_chart(title: str, label: str, bars: Sequence[Bars], show: Callable[[float], str]) -> str:
    """A horizontal bar chart: a group per category, with a bar per variant.

    Args:
        title: the title of the chart.
        label: the meaning of the bar length.
        bars: the variants; a variant without a value for a category has no bar there.
        show: formats a value for the end of its bar.
    """
    names = list(dict.fromkeys(name for one in bars for name in one.values))
    left = 12 + LETTER * max(map(len, names))
    x = Scale(0.0, max(max(one.values.values()) for one in bars) or 1.0, left, WIDTH - 52)
    parts, y = [], float(TOP)
    for name in names:
        present = [one for one in bars if name in one.values]
        middle = y + THICK * len(present) / 2 + 4
        parts.append(f'<text class="tick" x="{left - 7:.1f}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for one in present:
            end, value = x(one.values[name]), show(one.values[name])
            parts.append(
                f'<rect class="fill c{one.index % COLORS}" x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" '
                f'height="{THICK - 1}"><title>{escape(f"{one.name}, {name}: {value}")}</title></rect>'
                f'<text class="tick" x="{end + 5:.1f}" y="{y + THICK - 1:.1f}">{escape(value)}</text>'
            )
            y += THICK
        y += BETWEEN
    values = "; ".join(f"{one.name}: {', '.join(f'{n} {show(v)}' for n, v in one.values.items())}" for one in bars)
    return "\n".join(
        [
            f"<h3>{escape(title)}</h3>",
            f'<svg class="chart" viewBox="0 0 {WIDTH} {y:.0f}" role="img">',
            f"<title>{escape(title)}</title><desc>{escape(f'{label}. {values}.')}</desc>",
            f'<text class="label" x="4" y="14">{escape(label)}</text>',
            *parts,
            f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 4}" y2="{y - BETWEEN + 3:.1f}"/>',
            "</svg>",
        ]
    )


def swatch(index: int) -> str:
    """The marker of a series, for a legend."""
    return f'<svg class="swatch" viewBox="-7 -7 14 14" aria-hidden="true">{_marker(0, 0, index)}</svg>'


def _chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    log_x: bool,
    joined: bool,
    log_y: bool = False,
    cut: float = CUT,
    in_view: Sequence[float] = (),
) -> str:
    series = [one for one in series if one.mean]
    if not series:
        return f'<p class="empty">{escape(title)}: nothing to draw yet.</p>'
    right = 32 + LETTER * max(len(_short(one.name)) for one in series) if joined else 14
    xs = [at for one in series for line in (*one.runs, one.mean) for at, _ in line]
    x = _x_scale(xs, log_x, WIDTH - right, joined)
    y = _y_scale(series, cut if joined else 0.0, log_y, in_view)
    draw, name = (_curves, _names_aside) if joined else (_points, _names_beside)
    clip = "clip-" + "".join(letter for letter in title.lower() if letter.isascii() and letter.isalnum())
    ends = "; ".join(_note(one.name, *one.mean[-1]) for one in series)
    return "\n".join(
        [
            f"<h3>{escape(title)}</h3>",
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{escape(title)}</title><desc>{escape(f'{y_label} against {x_label}. {ends}.')}</desc>",
            f'<clipPath id="{clip}"><rect x="{LEFT - 6}" y="{TOP}" width="{WIDTH - right - LEFT + 12:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>',
            _axes(x, y, *(text + " (log scale)" * log for text, log in ((x_label, log_x), (y_label, log_y)))),
            f'<g clip-path="url(#{clip})">',
            *(draw(one, x, y) for one in series),
            "</g>",
            name(series, x, y),
            "</svg>",
        ]
    )


def _x_scale(values: list[float], log: bool, end: float, joined: bool) -> Scale:
    low, high = min(values), max(values)
    log = log and low > 0
    if log:
        margin = (high / low) ** (0.0 if joined else 0.12) if high > low else 1.5
        return Scale(low / margin, high * margin, LEFT, end, log=True)
    if joined:
        return Scale(min(0.0, low), high or 1.0, LEFT, end)
    margin = 0.15 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(max(0.0, low - margin), high + margin, LEFT, end)


def _y_scale(series: Sequence[Series], cut: float, log: bool, in_view: Sequence[float]) -> Scale:
    lines = [line for one in series for line in (*one.runs, one.mean) if line]
    values = [*in_view, *(at for line in lines for x, at in line if x >= _after(cut, line))]
    for one in series:
        for (_, at), spread in zip(one.mean, one.spread, strict=False):
            values += [at - (spread or 0), at + (spread or 0)]
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.06 if high > low else 1.5
        return Scale(low / margin, high * margin, HEIGHT - BOTTOM, TOP, log=True)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _after(cut: float, line: list[Point]) -> float:
    """Where the first part of a curve ends; it starts at 0, or below if the curve does."""
    first, last = min(0.0, line[0][0]), line[-1][0]
    return first + cut * (last - first)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    parts = []
    y_ticks = y.ticks(5)
    decimals = max((len(f"{tick:g}".partition(".")[2]) for tick in y_ticks), default=0)
    for tick in y_ticks:
        at, text = y(tick), f"{tick:.{decimals}f}"
        if y.log:  # e.g. 1e-4, because 0.0001 is too wide
            text = f"{tick:g}" if 0.001 <= tick < 1000 else f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x.ticks(5):
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{y.start}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{y.start + 17}" text-anchor="middle">{human(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{x.end:.1f}" y1="{y.start}" y2="{y.start}"/>')
    middle = (LEFT + x.end) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="4" y="14">{escape(y_label)}</text>')
    return "\n".join(parts)


def _curves(one: Series, x: Scale, y: Scale) -> str:
    dash = " dashed" if one.unfinished else ""
    parts = [f'<g class="c{one.index % COLORS}">']
    if len(one.runs) > 1:
        parts += [f'<path class="thin{dash}" d="{_path(line, x, y)}"/>' for line in one.runs if line]
    parts.append(f'<path class="thick{dash}" d="{_path(one.mean, x, y)}"/>')
    every = math.ceil(len(one.mean) / MOST_MARKERS)
    parts += [_marker(x(a), y(b), one.index, _note(one.name, a, b)) for a, b in one.mean[::-every]]
    return "".join(parts) + "</g>"


def _points(one: Series, x: Scale, y: Scale) -> str:
    parts = [f'<g class="c{one.index % COLORS}">']
    if len(one.runs) > 1:
        runs = (point for line in one.runs for point in line)
        parts += [_marker(x(a), y(b), one.index, _note(f"{one.name}, one run", a, b), "faint") for a, b in runs]
    for (a, b), spread in zip(one.mean, one.spread or [None] * len(one.mean), strict=True):
        if spread:
            ends = (y(b - spread), y(b + spread))
            bar = f"M{x(a):.1f},{ends[0]:.1f}V{ends[1]:.1f}" + "".join(f"M{x(a) - 5:.1f},{end:.1f}h10" for end in ends)
            parts.append(f'<path class="bar" d="{bar}"/>')
        parts.append(_marker(x(a), y(b), one.index, _note(one.name, a, b, spread)))
    return "".join(parts) + "</g>"


def _names_aside(series: Sequence[Series], x: Scale, y: Scale) -> str:
    """Names in a column at the right, each at the height of its curve's end, moved apart to avoid overlap."""
    ordered = sorted(series, key=lambda one: y(one.mean[-1][1]))
    heights = _apart([y(one.mean[-1][1]) for one in ordered], gap=15, lowest=HEIGHT - BOTTOM - 4)
    return "".join(
        f'{_marker(x.end + 16, height, one.index)}<text class="name" x="{x.end + 24:.1f}" y="{height + 4:.1f}">'
        f"{escape(_short(one.name))}</text>"
        for height, one in zip(heights, ordered, strict=True)
    )


def _names_beside(series: Sequence[Series], x: Scale, y: Scale) -> str:
    """Each name to the right of its mean, or to the left at the chart's edge; moved down to avoid overlap."""
    parts, taken = [], []
    for one in sorted(series, key=lambda one: y(one.mean[-1][1])):
        across, height = x(one.mean[-1][0]), y(one.mean[-1][1]) + 4
        name = _short(one.name)
        length = LETTER * len(name)
        fits = across + 10 + length <= WIDTH
        left = across + 10 if fits else across - 10 - length
        for other_left, other_right, other_height in taken:
            if left < other_right and other_left < left + length and abs(height - other_height) < 14:
                height = other_height + 14
        taken.append((left, left + length, height))
        place = f'x="{across + (10 if fits else -10):.1f}" y="{height:.1f}" text-anchor="{"start" if fits else "end"}"'
        parts.append(f'<text class="name" {place}>{escape(name)}</text>')
    return "".join(parts)


def _apart(heights: list[float], gap: float, lowest: float) -> list[float]:
    """Moves `heights` (ascending) so that neighbours are at least `gap` apart and none is below `lowest`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    limit = lowest
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _path(line: list[Point], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)


def _marker(x: float, y: float, index: int, note: str = "", kind: str = "dot") -> str:
    title = f"<title>{escape(note)}</title>" if note else ""
    shape = MARKERS[
        (index + index // COLORS) % len(MARKERS)
    ]  # the seventh series reuses the first colour in another shape
    return f'<path class="{kind} c{index % COLORS}" transform="translate({x:.1f},{y:.1f})" d="{shape}">{title}</path>'


def _note(name: str, x: float, y: float, spread: float | None = None) -> str:
    return f"{name}: {f'{y:.4f}' if abs(y) >= 0.01 else f'{y:.2g}'}{f' ± {spread:.4f}' if spread else ''} at {human(x)}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"

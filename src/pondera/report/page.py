"""The report: one offline HTML file, made from run folders alone.

Runs with the same name are seeds of one variant. The page lists everything that is missing from a run and omits no run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from pondera.core.errors import UserError
from pondera.core.format import Point, human
from pondera.core.metric import SCORES, score_name
from pondera.core.run_config import RunConfig
from pondera.core.run_folder import Run, write_atomic
from pondera.evaluation import significance
from pondera.evaluation.halting_stats import HALTING_STATS
from pondera.evaluation.run_warnings import run_warnings
from pondera.report.halting_section import HaltingStats, halting_section
from pondera.report.heatmap import shade_html
from pondera.report.svg import COLORS, Series, line_chart, scatter_chart, swatch

Anything = TypeVar("Anything")

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bits_per_byte", "bits/byte", "{:.4f}".format),
    ("error", "error rate", "{:.4f}".format),
    ("passes_correlation", "passes ~ difficulty", "{:.2f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("passes_per_token", "passes/token", "{:.2f}".format),
    ("inference_flops_per_token", "inference FLOPs/token", human),
    ("kv_bytes_per_token", "KV bytes/token", human),
    ("train_flops", "training FLOPs", human),
    ("train_tokens_per_second", "training tokens/s", human),
    ("parameters", "parameters", human),
)


@dataclass
class RunView:
    """The contents of one run folder, and its problems."""

    run: Run
    where: str
    config: RunConfig
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    traces: dict[str, dict[str, Any]]
    depths: dict[str, Any]
    problems: list[str]

    def points(self, measure: Measure, x_key: str) -> dict[int, Point]:
        """The curve of a measure by step."""
        read = ((line.get("step"), line.get(x_key), measure.read(line)) for line in self.metrics)
        return {step: (x, y) for step, x, y in read if step is not None and x is not None and y is not None}


@dataclass
class Variant:
    """All runs with the same name."""

    name: str
    index: int
    runs: list[RunView] = field(default_factory=list)

    @property
    def finished(self) -> list[RunView]:
        return [run for run in self.runs if run.result]

    def values(self, key: str) -> list[float]:
        """One number of the result, for each finished run that has it."""
        numbers = (run.result.get(key) for run in self.finished)
        return [float(value) for value in numbers if isinstance(value, (int, float))]

    def scores(self, key: str) -> dict[int, float]:
        """One number of the result by seed; the mean if several runs have the same seed."""
        by_seed: dict[int, list[float]] = {}
        for run in self.finished:
            if isinstance(value := run.result.get(key), (int, float)):
                by_seed.setdefault(run.config.train.seed, []).append(float(value))
        return {seed: statistics.fmean(values) for seed, values in by_seed.items()}

    def curve(self, measure: Measure, x_key: str) -> Series:
        """The curves of the runs, and their mean over the steps common to all finished runs (or to all runs)."""
        curves = [run.points(measure, x_key) for run in self.runs]
        whole = [curve for run, curve in zip(self.runs, curves, strict=True) if run.result and curve]
        counted = whole or [curve for curve in curves if curve]
        steps = sorted(set.intersection(*(set(curve) for curve in counted))) if counted else []
        mean = [_middle([curve[step] for curve in counted]) for step in steps]
        lines = [list(curve.values()) for curve in curves]
        return Series(self.name, self.index, lines, mean, unfinished=not self.finished)


@dataclass(frozen=True)
class Measure:
    """The y axis of a curve: its label, and how to read it from a line of metrics."""

    label: str
    read: Callable[[dict[str, Any]], float | None]


VALIDATED = tuple(
    Measure(f"validation {label}", lambda line, name=name: (line.get("validation") or {}).get(name))
    for name, label in SCORES.items()
)
TRAINING_LOSS = Measure("training loss", lambda line: line.get("loss"))


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    title: str = "Pondera report",
    names: Mapping[Path, str] | None = None,
    comparisons: int | None = None,
) -> Path:
    """Writes one self-contained HTML page about some runs; it needs no network and no script.

    Args:
        runs: run folders; those with the same `name` in their config are seeds of one variant.
        out: the file to write.
        title: the title of the page.
        names: display names by path, for runs that were unpacked elsewhere (default: the paths).
        comparisons: the number of differences for which significance is corrected (default: `None`, those on the page).

    Returns:
        `out`.

    Raises:
        UserError: there are no runs, a path is not a run folder, or `out` is a folder.

    Example::

        write_report(["runs/plain-0", "runs/ponderlm2-0"], "report.html")
    """
    if not runs:
        raise UserError("no runs to report on; give at least one run folder")
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file, e.g. {out / 'report.html'}")
    variants = group_variants(view_run(path, (names or {}).get(Path(path))) for path in runs)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        headline=_headline(variants, comparisons),
        charts=_charts(variants),
        table=_table(variants),
        depths=_depths(variants),
        samples=_samples(variants),
        runs="\n".join(_made(run) for variant in variants for run in variant.runs),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode("utf-8", "backslashreplace"))  # file names may contain invalid Unicode
    return out


def view_run(path: str | Path, name: str | None = None) -> RunView:
    """Reads a run folder; missing or damaged files are listed as problems and raise no error.

    Args:
        path: the run folder.
        name: the name to show (default: `None`, the path).
    """
    run = Run.open(path)
    problems: list[str] = []

    def attempt(read: Callable[[], Anything], otherwise: Anything) -> Anything:
        try:
            return read()
        except UserError as error:
            problems.append(str(error))
            return otherwise

    config = attempt(lambda: run.config, RunConfig(name=run.path.name))
    metrics = attempt(run.metrics, [])
    result = attempt(run.result, None) or {}
    for key in [key for key, _, _ in COLUMNS if not isinstance(result.get(key), (int, float, type(None)))]:
        problems.append(f"result.json: {key} is not a number")
        del result[key]
    if not metrics:
        problems.append("no metrics (metrics.jsonl is missing or empty)")
    if not result:
        last = max((line.get("step") or 0 for line in metrics), default=0)
        problems.append(f"not finished: no result, last logged step {last} of {config.train.steps}")
    traces = attempt(run.traces, {})
    depths = traces.pop(HALTING_STATS, {})
    return RunView(
        run, name or str(run.path), config, attempt(lambda: run.env, {}), metrics, result, traces, depths, problems
    )


def group_variants(runs: Iterable[RunView]) -> list[Variant]:
    """Groups runs by name, in the order in which the names first appear."""
    variants: dict[str, Variant] = {}
    for run in runs:
        variants.setdefault(run.config.name, Variant(run.config.name, len(variants))).runs.append(run)
    return list(variants.values())


def score_key(variants: Iterable[Variant]) -> str:
    """The score by which the finished runs are compared."""
    return score_name([run.result for variant in variants for run in variant.finished])


def measure_of(variants: Iterable[Variant]) -> Measure:
    """The best measure that all validated runs have; the training loss if there was no validation yet."""
    runs = [run for variant in variants for run in variant.runs]
    validated = [run for run in runs if any(run.points(measure, "step") for measure in VALIDATED)]
    if not validated:
        return TRAINING_LOSS
    return next(measure for measure in VALIDATED if all(run.points(measure, "step") for run in validated))


def _headline(variants: list[Variant], comparisons: int | None) -> str:
    key, measure = score_key(variants), measure_of(variants)
    entries = [
        significance.Entry(
            name=variant.name,
            scores=variant.scores(key),
            prices={price: _mean(variant.values(price)) for price in significance.PRICES},
            curve=variant.curve(measure, "train_flops").mean,
        )
        for variant in variants
        if variant.values(key)
    ]
    first, *rest = significance.sentences(entries, SCORES[key], comparisons)
    runs = [run for variant in variants for run in variant.runs]
    seeds = sorted({run.config.train.seed for run in runs})
    counts = f"{_several(len(variants), 'variant')}, {_several(len(runs), 'run')}, seeds {', '.join(map(str, seeds))}"
    lead = f'<p class="lead">{escape(" ".join(rest))}</p>' if rest else ""
    return f'<p class="headline">{escape(first)}</p>{lead}<p class="facts">{counts}.</p>{_warnings(variants)}'


def _warnings(variants: list[Variant]) -> str:
    runs = [run for variant in variants for run in variant.runs]
    problems = ((run, [*run.problems, *run_warnings(run.result, run.config)]) for run in runs)
    warnings = [f"{run.where}: {problem}." for run, several in problems for problem in several]
    for variant in variants:
        first, *others = (set(_flat(run.config.to_dict()).items()) for run in variant.runs)
        differ = sorted({name for other in others for name, _ in first ^ other} - {"train.seed", "about"})
        if differ:
            warnings.append(f"The runs named {variant.name} differ in more than the seed: {', '.join(differ)}.")
        seeds = [run.config.train.seed for run in variant.runs]
        if len(set(seeds)) < len(seeds):
            warnings.append(
                f"Several runs named {variant.name} have the same seed, so their standard deviation is not over seeds."
            )
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(one)}</li>" for one in warnings)
    return f'<div class="card warning" role="note"><strong>Warnings</strong><ul>{items}</ul></div>'


def _charts(variants: list[Variant]) -> str:
    measure, key = measure_of(variants), score_key(variants)
    by_tokens, by_flops = (
        [variant.curve(measure, x_key) for variant in variants] for x_key in ("tokens", "train_flops")
    )
    by_price = [_price_series(variant, key) for variant in variants]
    drawn = (
        (
            line_chart("By training tokens", "training tokens", measure.label, by_tokens),
            "Score at equal training tokens.",
        ),
        (
            line_chart("By training compute", "training FLOPs", measure.label, by_flops, log_x=True),
            "Score at equal training FLOPs.",
        ),
        (
            scatter_chart("By cost per token", "inference FLOPs per token", f"final {SCORES[key]}", by_price),
            "Final score against inference cost. Bars: one standard deviation over seeds.",
        ),
    )
    legend = "".join(
        f'<li class="c{variant.index % COLORS}">{swatch(variant.index)}<b style="color:var(--ink)">{escape(variant.name)}</b> '
        f"<span>{escape(variant.runs[0].config.about)}</span></li>"
        for variant in variants
    )
    figures = "".join(
        f'<figure class="card">{chart}<figcaption>{caption}</figcaption></figure>' for chart, caption in drawn
    )
    note = "Lower is better. Thin lines: single seeds. Thick lines: their mean. Dashed lines: no finished run."
    return f'<ul class="legend">{legend}</ul><div class="charts">{figures}</div><p class="note">{note}</p>'


def _price_series(variant: Variant, key: str) -> Series:
    read = ((run.result.get("inference_flops_per_token"), run.result.get(key)) for run in variant.finished)
    points = [(float(x), float(y)) for x, y in read if x is not None and y is not None]
    runs = [[point] for point in points]
    if not points:
        return Series(variant.name, variant.index, runs, [])
    return Series(variant.name, variant.index, runs, [_middle(points)], [_spread([y for _, y in points])])


def _table(variants: list[Variant]) -> str:
    best = {
        key: min((_mean(variant.values(key)) for variant in variants if variant.values(key)), default=None)
        for key in SCORES
    }
    columns = [column for column in COLUMNS if any(variant.values(column[0]) for variant in variants)] or COLUMNS
    head = "".join(f'<th scope="col">{name}</th>' for _, name, _ in columns)
    rows = []
    for variant in variants:
        done, all_runs = len(variant.finished), len(variant.runs)
        seeds = _several(all_runs, "seed")
        state = seeds if done == all_runs else f"incomplete: {done} of {seeds} finished"
        cells = "".join(_cell(variant.values(key), show, best.get(key)) for key, _, show in columns)
        rows.append(
            f'<tr><th scope="row"><span class="c{variant.index % COLORS}">{swatch(variant.index)}</span>{escape(variant.name)}'
            f"<small>{state}</small></th>{cells}</tr>"
        )
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Scores and costs of each variant"><table>'
        f'<thead><tr><th scope="col">variant</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Mean ± sample standard deviation over the finished seeds; without ± if it is 0 or there is only '
        "one seed. Bold: the best score.</p>"
    )


def _cell(values: list[float], show: Callable[[float], str], best: float | None) -> str:
    if not values:
        return '<td aria-label="unknown">–</td>'
    mean, spread = _mean(values), _spread(values)
    style = ' class="best"' if mean == best else ""
    return f"<td{style}>{show(mean)}{f' <small>± {show(spread)}</small>' if spread else ''}</td>"


def _depths(variants: list[Variant]) -> str:
    """The halting section, with one run per variant."""
    chosen = ((variant, next((run for run in variant.runs if run.depths), None)) for variant in variants)
    return halting_section(
        [
            HaltingStats(variant.name, variant.index, run.config.train.seed, run.depths)
            for variant, run in chosen
            if run is not None
        ]
    )


def _samples(variants: list[Variant]) -> str:
    cards = []
    for variant in variants:
        run = next((run for run in variant.runs if run.traces), None)
        if run is None:
            cards.append(f'<p class="empty">{escape(variant.name)}: its run folders contain no trace.</p>')
            continue
        for name, trace in run.traces.items():
            about = f"seed {run.config.train.seed}" + (f", {name}" if len(run.traces) > 1 else "")
            title = f"<h3>{escape(variant.name)} <small>{escape(about)}</small></h3>"
            cards.append(f'<article class="card sample">{title}{_sample(trace, f"view-{len(cards)}")}</article>')
    return "\n".join(cards)


def _sample(trace: dict[str, Any], view: str) -> str:
    """One text, shaded by passes or by loss; two radio buttons select the shade without a script."""
    tokens, passes, nll = trace.get("tokens"), trace.get("passes"), trace.get("nll") or []
    if not tokens or not passes or len(tokens) != len(passes):
        return '<p class="empty">This trace is damaged: passes and tokens differ in length.</p>'
    known = [value for value in passes if value is not None] or [0.0]
    text = f'<div class="text" tabindex="0">{shade_html(tokens, passes, nll)}</div>'
    losses = [value for value in nll if value is not None]
    loss_key = _key("nll", min(losses), max(losses), "nats") if losses else ""
    if min(known) == max(known):
        summary = f"<p>Every token took {known[0]:g} {'pass' if known[0] == 1 else 'passes'}.</p>"
        if not losses:
            return summary
        switch = '<input class="view nll" type="radio" checked hidden>'
        return f"{summary}<details><summary>Loss per token</summary>{switch}{loss_key}{text}</details>"
    span = f"from {min(known):g} to {max(known):g}"
    summary = f"<p>{_mean(known):.2f} passes per token on average, {span}; darker tokens took more.</p>"
    switch = _radio(view, "passes", "passes", " checked") + (_radio(view, "nll", "loss") if losses else "")
    return f"{summary}{switch}{_key('passes', min(known), max(known), 'passes')}{loss_key}{text}"


def _radio(view: str, kind: str, label: str, checked: str = "") -> str:
    name = f"{view}-{kind}"
    button = f'<input class="view {kind}" type="radio" name="{view}" id="{name}"{checked}>'
    return f'{button}<label for="{name}">{label}</label>'


def _key(kind: str, low: float, high: float, unit: str) -> str:
    return f'<div class="key {kind}-key">{low:.3g}<span class="ramp"></span>{high:.3g} {unit}</div>'


def _made(run: RunView) -> str:
    import yaml

    env = run.env
    versions = {"python": env.get("python"), **(env.get("versions") or {})}
    seconds = run.result.get("train_seconds")
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": env.get("commit"),
        "machine": env.get("platform"),
        "device": env.get("device"),
        "CPUs": env.get("cpus"),
        "torch threads": env.get("torch_threads"),
        "training time": f"{seconds / 60:.1f} minutes" if seconds else None,
    }
    listing = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    config = yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True)
    where = escape(run.where) + ("" if run.result else ", incomplete")
    command = escape(str(env.get("command", "command unknown")))
    return (
        f"<details><summary>{escape(run.config.name)}, seed {run.config.train.seed} <small>{where}</small></summary>"
        f'<div class="card"><pre>{command}</pre><dl>{listing}</dl><pre>{escape(config)}</pre></div></details>'
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _middle(points: Sequence[Point]) -> Point:
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": repr(value)}
    return flat

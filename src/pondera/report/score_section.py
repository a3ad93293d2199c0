"""The sections of the report on scores and costs: headline, warnings, charts and table."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from pondera.core.metric import SCORES
from pondera.evaluation import significance
from pondera.evaluation.run_warnings import run_warnings
from pondera.report.svg import COLORS, Series, line_chart, scatter_chart, swatch
from pondera.report.variants import COLUMNS, Variant, mean_of, measure_of, middle_of, score_key, spread_of


def headline(variants: list[Variant], comparisons: int | None) -> str:
    """The sentences on significance, the number of runs, and warnings.

    Args:
        variants: the variants.
        comparisons: the number of differences for which significance is corrected (`None`: those on the page).
    """
    key, measure = score_key(variants), measure_of(variants)
    entries = [
        significance.Entry(
            name=variant.name,
            scores=variant.scores(key),
            prices={price: mean_of(variant.values(price)) for price in significance.PRICES},
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


def charts(variants: list[Variant]) -> str:
    """The curves by training tokens and FLOPs, and the final scores by cost."""
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
    return Series(variant.name, variant.index, runs, [middle_of(points)], [spread_of([y for _, y in points])])


def table(variants: list[Variant]) -> str:
    """Scores and costs of each variant, as means over seeds."""
    best = {
        key: min((mean_of(variant.values(key)) for variant in variants if variant.values(key)), default=None)
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
    mean, spread = mean_of(values), spread_of(values)
    style = ' class="best"' if mean == best else ""
    return f"<td{style}>{show(mean)}{f' <small>± {show(spread)}</small>' if spread else ''}</td>"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": repr(value)}
    return flat

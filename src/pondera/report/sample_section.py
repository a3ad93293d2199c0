"""The section of the report with texts, shaded by passes or by loss."""

from __future__ import annotations

from html import escape
from typing import Any

from pondera.report.heatmap import shade_html
from pondera.report.variants import Variant, mean_of


def samples(variants: list[Variant]) -> str:
    """The traced texts of one run of each variant."""
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
    summary = f"<p>{mean_of(known):.2f} passes per token on average, {span}; darker tokens took more.</p>"
    switch = _radio(view, "passes", "passes", " checked") + (_radio(view, "nll", "loss") if losses else "")
    return f"{summary}{switch}{_key('passes', min(known), max(known), 'passes')}{loss_key}{text}"


def _radio(view: str, kind: str, label: str, checked: str = "") -> str:
    name = f"{view}-{kind}"
    button = f'<input class="view {kind}" type="radio" name="{view}" id="{name}"{checked}>'
    return f'{button}<label for="{name}">{label}</label>'


def _key(kind: str, low: float, high: float, unit: str) -> str:
    return f'<div class="key {kind}-key">{low:.3g}<span class="ramp"></span>{high:.3g} {unit}</div>'

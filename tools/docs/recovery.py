"""The experiment on recovery: how well each reader reads tokens off noisy embeddings, by noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pondera.methods.probe.recovery import READERS
from pondera.report.figure import figure
from pondera.report.svg import Series, line_chart
from tools.docs.study import FIGURES
from tools.docs.tables import ROOT, generated, read, table

RESULTS = "results/recovery/smollm2.json"
PICTURE = FIGURES / "recovery.svg"


@generated
def recovery(path: str) -> str:
    """One row for each level of noise."""
    found = read(path)
    rows = [
        (
            f"{level['log_snr']:+.2f}",
            *(_cell(level, name) for name in READERS),
            " / ".join(f"{100 * level['whole'][name]['mean']:.0f} %" for name in READERS),
        )
        for level in found["levels"]
    ]
    head = ["logSNR", *(f"{name}: right (nats)" for name in READERS), "whole windows right"]
    low, high = found["noise_window"]
    size = found["tokens"] // found["windows"]
    about = (
        f"`{found['command']}`: {found['windows']} windows of {size} tokens, {found['seeds']} seeds of the noise, "
        f"mean ± standard deviation. Without any state the frequencies lose {found['prior_nats']:.2f} nats per token, and the "
        f"model {found['model_nats']:.2f}. Noise window (the pointwise reader loses 95 to 5 % of the first): logSNR "
        f"{low:+.2f} to {high:+.2f}."
    )
    return f"{table(head, rows)}\n\n{about}"


def _cell(level: dict[str, Any], name: str) -> str:
    right, nats = level["accuracy"][name], level["nats"][name]["mean"]
    return f"{right['mean']:.3f} ± {right['spread']:.3f} ({nats:.2f})"


def figures() -> dict[Path, str]:
    """The share of tokens that each reader gets right, by noise."""
    if not (ROOT / RESULTS).is_file():
        return {}
    levels = read(RESULTS)["levels"]
    lines = {name: [(one["log_snr"], one["accuracy"][name]["mean"]) for one in levels] for name in READERS}
    series = [Series(name, number, [line], line) for number, (name, line) in enumerate(lines.items())]
    title = "Tokens that are read off their noisy embeddings"
    chart = line_chart(title, "log signal-to-noise ratio", "share right", series, cut=0.0)
    return {PICTURE: figure(chart, READERS)}

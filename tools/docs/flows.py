"""The study of GFlowNets with α: exact laws, perfect samplers, and trained runs next to them."""

from __future__ import annotations

from statistics import mean
from typing import Any

from tools.docs.tables import generated, over_seeds, read, table

Row = dict[str, Any]


@generated
def flow_laws(path: str) -> str:
    """What is drawn at the optimum of each α, exactly."""
    found = read(path)
    rows = [
        (
            f"`{row['environment']}`",
            f"{row['alpha']:g}",
            f"{row['tv']:.3f}",
            f"{row['tv_reweighted']:.3f}",
            f"{row['effective_samples']:.2f}",
            f"{row['steps']:.2f}",
        )
        for row in found["laws"]
    ]
    head = ["environment", "α", "TV to R/Z", "TV, reweighted", "effective samples", "steps"]
    return f"{table(head, rows)}\n\n`{found['command']}`"


@generated
def flow_perfect(path: str) -> str:
    """Modes that a perfect sampler finds."""
    found = read(path)
    rows = [
        (
            f"Set {row['set']}",
            f"{row['modes']:,}",
            f"{row['samples']:,}",
            f"{row['found']:.4g}",
            f"{row['mean_reward']:.4g}",
        )
        for row in found["perfect"]
    ]
    head = ["task", "modes", "samples", "modes found by a perfect sampler", "its mean reward"]
    return f"{table(head, rows)}\n\n`{found['command']}`"


@generated
def flow_study(path: str) -> str:
    """One table per environment: trained runs, as means over seeds."""
    found, parts = read(path), []
    for environment in dict.fromkeys(row["environment"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["environment"] == environment]
        lines = []
        for name in dict.fromkeys((row["objective"], row["variant"]) for row in own):
            runs = [row for row in own if (row["objective"], row["variant"]) == name]
            lines.append((f"{name[0]}, {name[1]}", str(len(runs)), *_cells(runs)))
        first = own[0]
        expected = f"{first['perfect_at_quarter']:.3g} at ¼ and {first['perfect_modes']:.3g} at the end"
        perfect = f"a perfect sampler finds {expected} of {first['modes']:,} modes"
        head = ["run", "seeds", "modes at ¼", "modes", "E[R] / target", "TV", "Spearman", "slope"]
        parts.append(f"**`{environment}`**, {first['steps']:,} steps ({perfect})\n\n{table(head, lines)}")
    return "\n\n".join(parts) + f"\n\n`{found['command']}`: {len(found['rows'])} runs; mean ± standard deviation."


def _cells(runs: list[Row]) -> tuple[str, ...]:
    ratios = [row["mean_reward"] / row["target_mean_reward"] for row in runs]
    return (
        over_seeds([row["modes_at_quarter"] for row in runs], "{:.1f}".format),
        over_seeds([row["modes_found"] for row in runs], "{:.1f}".format),
        over_seeds(ratios, "{:.2f}".format),
        over_seeds([row["tv"] for row in runs]),
        over_seeds([row["spearman"] for row in runs], "{:.2f}".format),
        f"{mean(row['slope'] for row in runs):.2f}",
    )

"""Tables of KV cache methods: loss of quantized caches, recall of eviction policies, and agreement with kvpress."""

from __future__ import annotations

import statistics
from typing import Any

from tools.docs.tables import generated, over_seeds, read, table, with_spread


@generated
def codes(path: str) -> str:
    """Loss of quantized caches by bits per number."""
    found = read(path)
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["name"], row["bits"]), []).append(row)
    rows = []
    for (name, bits), group in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        means = {key: statistics.mean(row[key] for row in group) for key in ("keys_error", "values_error")}
        losses = [row["more_than_exact"] for row in group]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        used = [row["codes_used"] for row in group if "codes_used" in row]
        rows.append(
            (
                name,
                f"{bits:.2f}",
                str(len(group)) if group[0]["seed"] is not None else "",
                with_spread({"mean": statistics.mean(losses), "spread": spread}, sign="+"),
                *(f"{mean:.3f}" for mean in means.values()),
                f"{statistics.mean(used):.0%}" if used else "",
            )
        )
    head = [
        "codes",
        "bits per number",
        "fits",
        "loss above exact, nats",
        "key error",
        "value error",
        "codes used",
    ]
    size = f"{found['exact']['tokens']:,} held-out tokens, loss with the exact cache {found['exact']['loss']:.3f} nats"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}; mean ± standard deviation over fits."


@generated
def eviction(path: str) -> str:
    """Recall and loss of every policy at every budget."""
    found = read(path)
    values: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in found["rows"]:
        value = row["loss"] if row["task"] == "text" else 100 * row["recall"]
        values.setdefault((row["policy"], row["share"]), {}).setdefault(row["task"], []).append(value)
    tasks = list(next(iter(values.values())))
    rows = []
    for (policy, share), by_task in sorted(values.items(), key=lambda item: -item[0][1]):
        shows = ("{:.2f}" if task == "text" else "{:.0f}" for task in tasks)
        cells = [over_seeds(by_task[task], show.format) for task, show in zip(tasks, shows, strict=True)]
        rows.append((f"`{policy}`", f"{share:g}", *cells))
    head = ["policy", "budget", *("loss on text" if task == "text" else f"{task}, %" for task in tasks)]
    return f"{table(head, rows)}\n\n`{found['command']}`: mean ± standard deviation over models."


@generated
def kvpress(path: str) -> str:
    """Kept sets compared with kvpress."""
    found = read(path)
    rows = [
        (f"`{row['policy']}`", f"{row['share']:g}", f"{row['same']} of {row['sets']}", f"{100 * row['overlap']:.2f} %")
        for row in found["rows"]
    ]
    said = f"`{found['command']}`, compared with {found['peer']}."
    return f"{table(['policy', 'budget', 'identical kept sets', 'overlap of kept tokens'], rows)}\n\n{said}"

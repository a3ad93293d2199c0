"""Tables of combined methods: a KV-cache method under a model that thinks."""

from __future__ import annotations

import statistics
from typing import Any

from tools.docs.tables import generated, read, table


@generated
def thinking_cache(path: str) -> str:
    """Quality and bytes of each cache, means over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in read(path)["runs"].values():
        for row in run["rows"]:
            groups.setdefault((run["recipe"], row["method"]), []).append(row)
    rows = []
    for (recipe, method), group in groups.items():
        full = groups[recipe, "PreallocatedCache()"]
        change = [row["bits_per_byte"] - other["bits_per_byte"] for row, other in zip(group, full, strict=True)]
        mean = {name: statistics.mean(row[name] for row in group) for name in ("cache_bytes", "of_full", "agreement")}
        rows.append(
            (
                recipe,
                f"`{method}`",
                f"{mean['cache_bytes'] / 1000:.0f}",
                f"{mean['of_full']:.0%}",
                f"{statistics.mean(row['bits_per_byte'] for row in group):.3f}",
                f"{statistics.mean(change):+.4f} ± {statistics.stdev(change):.4f}",
                f"{mean['agreement']:.1%}",
            )
        )
    head = ["model", "cache", "kB", "of full", "bits per byte", "change against full (sd)", "top-1 agreement"]
    return table(head, rows)

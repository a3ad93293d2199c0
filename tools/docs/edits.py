"""The experiment on caches that follow edits: loss against a fresh reading, and the share that is recomputed."""

from __future__ import annotations

from tools.docs.tables import generated, read, table


@generated
def edits(path: str) -> str:
    """One row per edit and way to get the cache."""
    found = read(path)
    rows = [
        (
            row["edit"],
            row["cache"],
            f"{100 * row['recomputed']:.1f} %",
            f"{row['worse']:+.4f} ± {row['half_width']:.4f}",
        )
        for row in found["rows"]
    ]
    head = ["edit", "cache", "recomputed", "nats per token, against a fresh reading"]
    settings = f"{found['model']} in {found['dtype']}, {found['texts']} texts of {found['tokens']} tokens"
    return f"{table(head, rows)}\n\n{settings}; ± 95 % CI, paired by text. `{found['command']}`"

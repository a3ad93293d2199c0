"""Tables of block-recurrent models: score by position in the sequence, and two tasks."""

from __future__ import annotations

from tools.docs.tables import generated, read, table, with_spread


@generated
def places(path: str) -> str:
    """Score by position of the block in its sequence, and the difference to the variant without memory."""
    found = read(path)
    parts = []
    for context in dict.fromkeys(row["context"] for row in found["table"]):
        own = [row for row in found["table"] if row["context"] == context]
        stretches = list(dict.fromkeys(tuple(row["blocks"]) for row in own))
        rows = []
        for arm, points in dict.fromkeys((row["arm"], row["points"]) for row in own):
            cells = {tuple(row["blocks"]): row for row in own if (row["arm"], row["points"]) == (arm, points)}
            name = f"`{arm}`" + (f", {points}" if points != "uniform" else "")
            which, sign = ("bits_per_byte", "") if arm == "blocks" else ("against_blocks", "+")
            rows.append((name, *(with_spread(cells[stretch][which], sign) for stretch in stretches)))
        named = [f"block {a + 1}" if b == a + 1 else f"blocks {a + 1} to {b}" for a, b in stretches]
        parts.append(f"Sequences of {context} tokens, blocks of {found['block']}:\n\n{table(['model', *named], rows)}")
    said = f"`{found['command']}`: bits per byte of `blocks`, and the differences of the others to it, paired by seed; mean ± "
    return "\n\n".join([*parts, said + "standard deviation."])


@generated
def tasks(path: str) -> str:
    """Results of small models on two tasks."""
    found = read(path)
    arms: dict[str, dict[str, str]] = {}
    for row in found["table"]:
        arms.setdefault(row["arm"], {})[row["task"]] = with_spread(row.get("error", row.get("accuracy")))
    rows = [(f"`{arm}`", *(said.get(task, "") for task in ("slow-signal", "needle"))) for arm, said in arms.items()]
    head = ["model", "slow signal: error over variance", "needle: accuracy (chance 0.06)"]
    steps = found["rows"][0]["steps"]
    return f"{table(head, rows)}\n\n`{found['command']}`: {steps} steps, {found['seeds']} seeds, mean ± standard deviation."

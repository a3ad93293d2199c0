"""Tables of trained models that are compared."""

from __future__ import annotations

from typing import Any

from pondera.comparison.verdict import differences
from pondera.evaluation.significance import Gap, gap
from tools.docs.tables import generated, over_seeds, read, table, with_spread


@generated
def comparison(path: str) -> str:
    """A comparison: scores and costs; costs are relative to the first row."""
    found = read(path)
    first = found["rows"][0]
    rows = []
    for row in found["rows"]:
        rows.append(
            (
                f"`{row['name']}`",
                f"{row['parameters']['mean'] / first['parameters']['mean']:.2f} ×",
                f"{row['train_tokens']['mean'] / 1e6:.2f} M",
                f"{row['train_flops']['mean'] / first['train_flops']['mean']:.2f} ×",
                f"{row['inference_flops_per_token']['mean'] / first['inference_flops_per_token']['mean']:.2f} ×",
                f"{row['kv_bytes_per_token']['mean'] / first['kv_bytes_per_token']['mean']:.2f} ×",
                with_spread(row["bits_per_byte"]),
                "" if row is first else with_spread(row["bits_per_byte_against_baseline"], sign="+"),
            )
        )
    head = [
        "recipe",
        "parameters",
        "tokens",
        "training FLOPs",
        "inference FLOPs",
        "KV bytes",
        "bits per byte",
        f"difference to {found['baseline']}",
    ]
    said = "\n".join(f"- {sentence}" for sentence in verdicts(found["rows"], found.get("comparisons", 1)))
    return f"{table(head, rows)}\n\n{said}\n\n`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."


def verdicts(rows: list[dict[str, Any]], comparisons: int = 1) -> list[str]:
    """The differences that `pondera compare` reports: to the first row, at about equal inference FLOPs, and to controls.

    Args:
        rows: the rows of a comparison.
        comparisons: the number of differences for which significance is corrected; earlier versions corrected for none.
    """
    return [found.at + _sentence(found.row, found.other, found.which, comparisons) for found in differences(rows)]


def _sentence(row: dict[str, Any], other: dict[str, Any], which: str, comparisons: int) -> str:
    found = gap(_scores(row), _scores(other), comparisons)
    about = f"{_interval(found)}, {found.how}, {found.seeds}: {found.judged}"
    return f"{row['name']} against {other['name']}{which}: {found.mean:+.3f} bits per byte ({about})."


def _scores(row: dict[str, Any]) -> dict[int, float]:
    return dict(zip(row["seeds"], row["bits_per_byte"]["values"], strict=True))


def _interval(found: Gap) -> str:
    return "no interval" if found.margin is None else f"95 % CI ± {found.margin:.3f}"


def _significance(found: Gap) -> str:
    return "significant" if found.clear else "not significant"


@generated
def versus(path: str) -> str:
    """The differences of one variant, named after a ``#``, to all others of a comparison, paired by seed."""
    file, _, name = path.partition("#")
    arms = {row["name"]: row for row in read(file)["rows"]}
    scores = {arm: _scores(row) for arm, row in arms.items()}
    first, rows = arms[name], []
    for arm, row in arms.items():
        if arm != name:
            found = gap(scores[name], scores[arm])
            rows.append(
                (
                    f"`{arm}`",
                    f"{row['parameters']['mean'] / first['parameters']['mean']:.2f} ×",
                    f"{row['train_flops']['mean'] / first['train_flops']['mean']:.2f} ×",
                    f"{found.mean:+.3f} ± {found.margin:.3f}",
                    _significance(found),
                )
            )
    head = [
        f"`{name}` against",
        "other's parameters",
        "other's training FLOPs",
        "difference in bits per byte (95 % CI)",
        "significance",
    ]
    return table(head, rows)


@generated
def pairs_and_words(path: str) -> str:
    """Minimal pairs and last words: the mean of each model, and its difference to plain and to twice the depth."""
    found, rows = read(path), []
    measures = (("pairs", "accuracy", 100), ("last_word", "log_probability_per_byte", 1))
    for name in found["pairs"]["arms"]:
        cells = [f"`{name}`"]
        for task, key, scale in measures:
            measured = found[task]["arms"][name][key]
            cells.append(over_seeds([scale * value for value in measured["by_seed"].values()], "{:.2f}".format))
            for base in ("plain", "doubledepth"):
                apart = measured["against"].get(base)
                cells.append(
                    "" if apart is None else f"{scale * apart['difference']:+.2f} ± {scale * apart['margin']:.2f}"
                )
        rows.append(tuple(cells))
    bases = ["to `plain`", "to `doubledepth`"]
    head = ["model", "pairs right, %", *bases, "last word, nats per byte", *bases]
    size = f"{found['pairs']['rows']:,} pairs and {found['last_word']['rows']:,} texts"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}; differences with their 95 % CI, paired by seed."

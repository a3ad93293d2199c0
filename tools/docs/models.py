"""Tables of trained models: comparisons, passes per token, and score by effort."""

from __future__ import annotations

from typing import Any

from pondera.evaluation.significance import Gap, gap
from tools.docs.tables import generated, read, table, with_spread


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
        "tokens",
        "training FLOPs",
        "inference FLOPs",
        "KV bytes",
        "bits per byte",
        f"difference to {found['baseline']}",
    ]
    said = "\n".join(f"- {sentence}" for sentence in verdicts(found["rows"]))
    return f"{table(head, rows)}\n\n{said}\n\n`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The difference of each row to the first, and of rows to the first other row of about equal inference FLOPs."""
    sentences = [_sentence(row, rows[0]) for row in rows[1:]]
    leaders = rows[:1]
    for row in rows[1:]:
        leader = next((one for one in leaders if _about_equal(one, row)), None)
        if leader is None:
            leaders.append(row)
        elif leader is not rows[0]:
            sentences.append(f"At about equal inference FLOPs, {_sentence(row, leader)}")
    return sentences


def _about_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    costs = [row["inference_flops_per_token"]["mean"] for row in (one, other)]
    return max(costs) <= 1.15 * min(costs)


def _sentence(row: dict[str, Any], other: dict[str, Any]) -> str:
    found = gap(_scores(row), _scores(other))
    about = f"{_interval(found)}, {found.how}, {found.seeds}: {_significance(found)}"
    return f"{row['name']} against {other['name']}: {found.mean:+.3f} bits per byte ({about})."


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
def zeroed(path: str) -> str:
    """Scores of a trained model with its concepts and without them."""
    found = read(path)["rows"]
    return table(["concepts", "bits per byte"], [(name, with_spread(found[name])) for name in ("with", "without")])


@generated
def depth(path: str) -> str:
    """A comparison of variants with different numbers of passes: score against the measured passes per token."""
    found = read(path)
    first = found["rows"][0]
    rows = [
        (
            f"`{row['name']}`",
            with_spread(row["passes_per_token"]),
            f"{row['inference_flops_per_token']['mean'] / first['inference_flops_per_token']['mean']:.2f} ×",
            f"{row['train_flops']['mean'] / first['train_flops']['mean']:.2f} ×",
            with_spread(row["bits_per_byte"]),
            "" if row is first else with_spread(row["bits_per_byte_against_baseline"], sign="+"),
        )
        for row in found["rows"]
    ]
    head = ["model", "passes per token", "inference FLOPs", "training FLOPs", "bits per byte", "difference to plain"]
    return f"{table(head, rows)}\n\n`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."


@generated
def effort(path: str) -> str:
    """Score and passes by effort."""
    found = read(path)
    arms: dict[str, dict[float, str]] = {}
    for row in found["rows"]:
        said = f"{with_spread(row['bits_per_byte'])} at {row['passes_per_token']['mean']:.2f}"
        arms.setdefault(row["arm"], {})[row["effort"]] = said
    efforts = list(next(iter(arms.values())))
    rows = [(f"`{arm}`", *(at[each] for each in efforts)) for arm, at in arms.items()]
    head = ["model", *(f"effort {each:g}" for each in efforts)]
    return f"{table(head, rows)}\n\n`{found['command']}`: bits per byte at mean passes per token."

"""Tables of trained models: methods side by side, where passes go, what less effort costs."""

from __future__ import annotations

from pondera.jobs.verdict import gap
from tools.docs.tables import generated, read, table, with_spread


@generated
def comparison(path: str) -> str:
    """A comparison: score and prices, each relative to the first row where that says more."""
    found = read(path)
    first = found["rows"][0]
    rows = []
    for row in found["rows"]:
        gap = row["bits_per_byte_against_baseline"]
        rows.append(
            (
                f"`{row['name']}`",
                f"{row['train_tokens']['mean'] / 1e6:.2f} M",
                f"{row['train_flops']['mean'] / first['train_flops']['mean']:.2f} ×",
                f"{row['inference_flops_per_token']['mean'] / first['inference_flops_per_token']['mean']:.2f} ×",
                f"{row['kv_bytes_per_token']['mean'] / first['kv_bytes_per_token']['mean']:.2f} ×",
                with_spread(row["bits_per_byte"]),
                "" if row is first else with_spread(gap, sign="+"),
            )
        )
    head = [
        "recipe",
        "tokens",
        "training FLOPs",
        "inference FLOPs",
        "KV bytes",
        "bits per byte",
        f"against {found['baseline']}, same seed",
    ]
    said = "\n".join(f"- {sentence}" for sentence in found["verdict"])
    return f"{table(head, rows)}\n\n{said}\n\n`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."


@generated
def versus(path: str) -> str:
    """One arm of a comparison, named after a ``#``, against every other: the difference seed by seed, and whether it counts."""
    file, _, name = path.partition("#")
    arms = {row["name"]: row for row in read(file)["rows"]}
    scores = {arm: dict(zip(row["seeds"], row["bits_per_byte"]["values"], strict=True)) for arm, row in arms.items()}
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
                    "more than seeds explain" if found.clear else "could be noise",
                )
            )
    head = [f"`{name}` against", "its parameters", "its training FLOPs", "bits per byte, 95 %, paired", "which is"]
    return table(head, rows)


@generated
def zeroed(path: str) -> str:
    """A trained model with its concepts and without them."""
    found = read(path)["rows"]
    return table(["concepts", "bits per byte"], [(name, with_spread(found[name])) for name in ("with", "without")])


@generated
def depth(path: str) -> str:
    """A comparison of arms whose depth differs: score against the passes that tokens were measured to take."""
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
    head = ["arm", "passes per token", "inference FLOPs", "training FLOPs", "bits per byte", "against plain, same seed"]
    return f"{table(head, rows)}\n\n`{found['command']}`, {found['seeds']} seeds, mean ± standard deviation."


@generated
def effort(path: str) -> str:
    """Score against the effort asked for; passes beside it."""
    found = read(path)
    arms: dict[str, dict[float, str]] = {}
    for row in found["rows"]:
        said = f"{with_spread(row['bits_per_byte'])} at {row['passes_per_token']['mean']:.2f}"
        arms.setdefault(row["arm"], {})[row["effort"]] = said
    efforts = list(next(iter(arms.values())))
    rows = [(f"`{arm}`", *(at[each] for each in efforts)) for arm, at in arms.items()]
    head = ["arm", *(f"effort {each:g}" for each in efforts)]
    return f"{table(head, rows)}\n\n`{found['command']}`: bits per byte at mean passes per token."

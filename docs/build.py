"""Writes figures and the generated parts of README.md and docs/*.md from the index of methods and the files under results/.

    python docs/build.py            rewrites them
    python docs/build.py --check    exits 1 if one of them is not what it would write

A generated part stands between ``<!-- generated: NAME ARGUMENT -->`` and ``<!-- end -->``. Figures are files of their own
beside the pages that show them.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable

import study
from tables import ROOT, read, table, with_spread

from pondera.ground import spec
from pondera.jobs.verdict import gap

PART = re.compile(r"(<!-- generated: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods(_: str) -> str:
    """The index of methods."""
    rows = [(f"`{m.name}`", m.seam, m.paper, m.price, m.reproduced) for m in spec.index().values()]
    return table(["method", "seam", "source", "price", "claim at our scale"], rows)


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


def zeroed(path: str) -> str:
    """A trained model with its concepts and without them."""
    found = read(path)["rows"]
    return table(["concepts", "bits per byte"], [(name, with_spread(found[name])) for name in ("with", "without")])


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


def authors(path: str) -> str:
    """Training speed beside the authors' code."""
    found = read(path)
    rows = [
        (
            name,
            f"{row['backbone']['vocab_size']:,}",
            f"{row['tokens_per_second']['theirs']:.0f}",
            f"{row['tokens_per_second']['ours']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})",
            f"{row['ratio_by_arithmetic']:.2f}",
            f"{row['gradient_difference']:.0e}" if not row["note"] else "another mixture",
        )
        for name, row in found["rows"].items()
    ]
    head = ["model", "vocabulary", "theirs, tokens/s", "ours, tokens/s", "ratio", "by FLOPs", "gradients apart"]
    size = f"batch {found['batch']} of {found['context']} tokens, {found['threads']} threads, float32"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}, medians of {found['rounds']} interleaved rounds."


def packing(path: str) -> str:
    """What skipping saves, beside what arithmetic allows."""
    found = read(path)
    rows = [
        (
            row["method"],
            f"{row['task']}, batch {row['batch']}",
            f"{row['mean_passes']:.2f} of {row['passes']:.0f}",
            f"{row['dense_seconds'] / row['packed_seconds']:.2f} ×",
            f"{row['passes'] / row['mean_passes']:.2f} ×",
            f"{row['over_arithmetic']:.2f} ± {row['spread']:.2f}",
        )
        for row in found["rows"]
    ]
    head = ["method", "task", "passes", "faster than dense", "by arithmetic", "time over arithmetic"]
    return f"{table(head, rows)}\n\n`{found['command']}`: {found['machine']}; medians of interleaved rounds."


def quantizing(path: str) -> str:
    """Quantizers beside the other package and the machine's rate of matrix products, and which aims were reached."""
    found = read(path)
    rows = [
        (
            TASKS[row["task"]],
            f"{row['dim']}",
            f"{row['codes']:,}",
            f"{row['nanoseconds_per_vector']['ours']:,.0f}",
            f"{100 * row['share_of_matmul_rate']:.0f} %",
            f"{row['times_as_fast_as']['theirs']:.1f} ×",
            *(f"{row['memory_bytes'][by] / 2**20:,.0f}" for by in ("ours", "theirs")),
        )
        for row in found["rows"]
    ]
    head = ["task", "d", "K", "ns per vector", "of matrix products", "as fast as theirs", "MiB", "theirs"]
    said = "\n".join(f"- {sentence}" for sentence in map(aimed, found["rows"]) if sentence)
    size = f"{found['threads']} threads, float32, the least of {found['rounds']} rounds in turn"
    return f"{table(head, rows)}\n\n{said or '- Every aim was reached.'}\n\n`{found['command']}`: {size}."


TASKS = {"assign": "nearest code", "train": "training step", "residual": "8 levels", "kmeans": "k-means"}
AIMS = {"assign": (0.5, 8), "residual": (0.5, 8), "train": (0, 4)}
"""At least so much of the rate of matrix products, and so many times as fast as the other package."""


def aimed(row: dict[str, Any]) -> str:
    """Which aim a row misses; empty where it misses none."""
    share, times = AIMS.get(row["task"], (0, 0))
    found = row["share_of_matmul_rate"], row["times_as_fast_as"]["theirs"]
    missed = [f"{100 * found[0]:.0f} % of matrix products, aim {100 * share:.0f} %"] if found[0] < share else []
    missed += [f"{found[1]:.1f} times as fast as theirs, aim {times}"] if found[1] < times else []
    where = f"{TASKS[row['task']]}, d = {row['dim']}, K = {row['codes']:,}"
    return f"Missed at {where}: {'; '.join(missed)}." if missed else ""


def rounds(path: str) -> str:
    """Loss against the number of Jacobi rounds at evaluation."""
    rows = [
        (str(row["rounds"]), f"{row['bits_per_byte']:.4f}", f"{row['residuals'][-1]:.1e}" if "residuals" in row else "")
        for row in read(path)["rows"]
    ]
    return table(["rounds", "bits per byte", "largest change of a latent in the last round"], rows)


def speed(path: str) -> str:
    """Time beside arithmetic."""
    found = read(path)
    rows = [
        (
            name,
            f"{row['decode_tokens_per_second']:.0f}",
            f"{row['decode_speed_ratio']:.2f}",
            f"{row['decode_ratio_by_arithmetic']:.2f}",
            f"{row['train_cost_ratio']:.2f}",
            f"{row['train_cost_by_arithmetic']:.2f}",
        )
        for name, row in found["rows"].items()
    ]
    head = ["model", "decoding, tokens/s", "speed against bare", "by FLOPs", "training cost against bare", "by FLOPs"]
    size = f"{found['parameters'] / 1e6:.1f} M parameters, {found['threads']} threads, batch 1, float32"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}, medians of {found['rounds']} interleaved rounds."


def concept_speed(path: str) -> str:
    """Decoding with concepts beside the backbone alone."""
    found = read(path)
    rows = [
        (
            row["batch"],
            f"{row['tokens_per_second']['plain']:.0f}",
            f"{row['tokens_per_second']['concepts']:.0f}",
            f"{row['speed_ratio']:.2f} ({row['speed_ratio_lowest']:.2f} to {row['speed_ratio_highest']:.2f})",
            f"{row['ratio_by_flops']:.2f}",
            f"{row['speed_over_flops']:.2f}",
        )
        for row in found["rows"]
    ]
    head = ["batch", "plain, tokens/s", "ConceptLM, tokens/s", "speed against plain", "by FLOPs", "speed over FLOPs"]
    size = " and ".join(f"{count / 1e6:.1f}" for count in found["parameters"].values())
    size += f" M parameters, {found['new_tokens']} tokens after {found['prompt']}, {found['threads']} threads, float32"
    said = f"`{found['command']}`: `{found['segment']}`; {size}, medians of {found['rounds']} interleaved rounds."
    return f"{table(head, rows)}\n\n{said}"


def head_speed(path: str) -> str:
    """Time and memory of heads beside the output matrix."""
    found = read(path)
    full = found["rows"][0]
    rows = [
        (
            f"`{row['head']}`" if row is not full else "output matrix",
            f"{row['parameters'] / 1e6:.2f} M ({100 * row['parameters'] / full['parameters']:.1f} %)",
            f"{row['bytes'] / 1e6:.1f} MB",
            *(f"{1000 * row['seconds'][task]:,.0f} ms ({row['faster'][task]:.2g} ×)" for task in row["seconds"]),
            f"{row['training_bytes'] / 1e6:.0f} MB",
        )
        for row in found["rows"]
    ]
    head = ["head", "parameters", "held", *full["seconds"], "training rises by"]
    size = f"V = {found['vocabulary']:,}, D = {found['width']}, {found['threads']} threads, float32"
    said = f"`{found['command']}`: {size}, training on {found['tokens']} tokens; medians of {found['rounds']} rounds."
    return f"{table(head, rows)}\n\n{said} In brackets, how many times as fast as the matrix."


def codes(path: str) -> str:
    """What codes of the past cost in loss, beside the bits that they take."""
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
        "codes of the past",
        "bits per number",
        "fits",
        "loss against exact",
        "error of keys",
        "of values",
        "codes used",
    ]
    size = f"{found['exact']['tokens']:,} held-out tokens, loss with the exact cache {found['exact']['loss']:.3f} nats"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}; mean ± standard deviation over fits."


def memory(path: str) -> str:
    """Decoding over a long past, first tokens, and how much fits."""
    found = read(path)
    parts = []
    for name, row in found["rows"].items():
        kind, number, *batch = name.split()
        if kind == "decode":
            title = f"{int(number):,} tokens, batch {batch[1]}"
            head = ["cache", "ms per token", "tokens/s", "against DynamicCache", "attention alone", "of the floor"]
            head += ["MB read", "peak MB", "same bits"]
            lines = [(f"`{side}`", *_decoding(one)) for side, one in row.items()]
        elif kind == "first":
            title = f"a prompt of {int(number):,} tokens"
            head = ["cache", "seconds to the first token", "peak MB"]
            lines = [
                (f"`{side}`", one["unable"], "")
                if "unable" in one
                else (f"`{side}`", f"{one['seconds']:.1f}", _mb(one["peak"]))
                for side, one in row.items()
            ]
        else:
            title = f"how many tokens fit into {int(number) / 2**20:.0f} MiB beside the model"
            head = ["cache, numbers", "tokens", "against DynamicCache"]
            base = {side.split()[-1]: one["tokens"] for side, one in row.items() if side.startswith("DynamicCache")}
            lines = [
                (f"`{side}`", f"{one['tokens']:,}", f"{one['tokens'] / base[side.split()[-1]]:.1f} ×")
                for side, one in row.items()
            ]
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{table(head, lines)}")
    rates = found["rates"]
    about = (
        f"`{found['command']}`: {rates['parameters'] / 1e6:.0f} M parameters, float32, {found['threads']} threads, medians of "
        f"{found['rounds']} interleaved rounds; memory is read at {max(rates['read'], rates['copy']) / 1e9:.0f} GB/s."
    )
    return "\n\n".join([*parts, about])


def _decoding(one: dict[str, Any]) -> tuple[str, ...]:
    if "unable" in one:
        return (one["unable"], *[""] * 7)
    return (
        f"{one['milliseconds_per_token']:.1f}",
        f"{one['tokens_per_second']:.1f}",
        f"{one['times_as_fast_as_dynamic']:.2f} ×",
        f"{one['attention_times_as_fast']:.1f} ×",
        f"{100 * one['share_of_floor']:.0f} %",
        _mb(one["held_bytes"]),
        _mb(one["peak_bytes"]),
        "yes" if one["same_bits_as_dynamic"] else "no",
    )


def _mb(number: float) -> str:
    return f"{number / 1e6:.0f}"


def output(path: str) -> str:
    """What a command printed."""
    return f"```text\n{(ROOT / path).read_text().rstrip()}\n```"


MAKERS: dict[str, Callable[[str], str]] = {
    maker.__name__: maker
    for maker in (
        methods,
        comparison,
        versus,
        zeroed,
        depth,
        effort,
        authors,
        packing,
        quantizing,
        rounds,
        speed,
        concept_speed,
        head_speed,
        codes,
        memory,
        output,
        *study.MAKERS,
    )
}


def built(text: str) -> str:
    """`text` with every generated part made anew."""

    def made(part: re.Match[str]) -> str:
        # A result that no command has written yet leaves its place empty, never filled by hand.
        there = not part[3] or (ROOT / part[3].partition("#")[0]).is_file()
        return f"{part[1]}{MAKERS[part[2]](part[3]) if there else '*not run yet*'}\n{part[4]}"

    return PART.sub(made, text)


def main() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {page: built(page.read_text()) for page in pages} | study.figures()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
    if stale:
        print("not what the results say:" if "--check" in sys.argv else "rewrote:", *(path.name for path in stale))
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()

"""Tables of benchmarks: Pondera compared with other code, with the limits of the machine, and with plain models."""

from __future__ import annotations

from typing import Any

from tools.docs.tables import generated, read, table


@generated
def authors(path: str) -> str:
    """Training speed compared with the authors' code."""
    found = read(path)
    rows = [
        (
            name,
            f"{row['backbone']['vocab_size']:,}",
            f"{row['tokens_per_second']['theirs']:.0f}",
            f"{row['tokens_per_second']['ours']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})",
            f"{row['ratio_by_arithmetic']:.2f}",
            f"{row['gradient_difference']:.0e}" if not row["note"] else "different mixture",
        )
        for name, row in found["rows"].items()
    ]
    head = ["model", "vocabulary", "theirs, tokens/s", "ours, tokens/s", "ratio", "by FLOPs", "gradient difference"]
    size = f"batch {found['batch']} of {found['context']} tokens, {found['threads']} threads, float32"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}, medians of {found['rounds']} interleaved rounds."


@generated
def packing(path: str) -> str:
    """The time saved by packing, compared with the ideal."""
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
    head = ["method", "task", "passes", "speed-up over dense", "by FLOPs", "time over FLOPs"]
    return f"{table(head, rows)}\n\n`{found['command']}`: {found['machine']}; medians of interleaved rounds."


@generated
def quantizing(path: str) -> str:
    """Quantizer speed compared with another package and the matmul rate of the machine, with missed targets."""
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
    head = ["task", "d", "K", "ns per vector", "share of matmul rate", "speed-up over theirs"]
    head += ["MiB, ours", "MiB, theirs"]
    said = "\n".join(f"- {sentence}" for sentence in map(aimed, found["rows"]) if sentence)
    size = f"{found['threads']} threads, float32, minimum of {found['rounds']} interleaved rounds"
    return f"{table(head, rows)}\n\n{said or '- Every target was reached.'}\n\n`{found['command']}`: {size}."


TASKS = {"assign": "nearest code", "train": "training step", "residual": "8 levels", "kmeans": "k-means"}
AIMS = {"assign": (0.5, 8), "residual": (0.5, 8), "train": (0, 4)}
"""Targets: minimum share of the matmul rate, and minimum speed-up over the other package."""


def aimed(row: dict[str, Any]) -> str:
    """The targets that a row misses, as text; empty if it misses none."""
    share, times = AIMS.get(row["task"], (0, 0))
    found = row["share_of_matmul_rate"], row["times_as_fast_as"]["theirs"]
    missed = [f"{100 * found[0]:.0f} % of the matmul rate, target {100 * share:.0f} %"] if found[0] < share else []
    missed += [f"{found[1]:.1f} times as fast as theirs, target {times}"] if found[1] < times else []
    where = f"{TASKS[row['task']]}, d = {row['dim']}, K = {row['codes']:,}"
    return f"Target missed at {where}: {'; '.join(missed)}." if missed else ""


@generated
def speed(path: str) -> str:
    """Measured speed compared with the FLOPs."""
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
    head = [
        "model",
        "decoding, tokens/s",
        "speed relative to bare",
        "by FLOPs",
        "training cost relative to bare",
        "by FLOPs",
    ]
    size = f"{found['parameters'] / 1e6:.1f} M parameters, {found['threads']} threads, batch 1, float32"
    return f"{table(head, rows)}\n\n`{found['command']}`: {size}, medians of {found['rounds']} interleaved rounds."


@generated
def concept_speed(path: str) -> str:
    """Decoding speed with concepts compared with the backbone alone."""
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
    head = [
        "batch",
        "plain, tokens/s",
        "ConceptLM, tokens/s",
        "speed relative to plain",
        "by FLOPs",
        "speed over FLOPs",
    ]
    size = " and ".join(f"{count / 1e6:.1f}" for count in found["parameters"].values())
    size += f" M parameters, {found['new_tokens']} tokens after {found['prompt']}, {found['threads']} threads, float32"
    said = f"`{found['command']}`: `{found['segment']}`; {size}, medians of {found['rounds']} interleaved rounds."
    return f"{table(head, rows)}\n\n{said}"


@generated
def head_speed(path: str) -> str:
    """Time and memory of heads compared with the output matrix."""
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
    head = ["head", "parameters", "memory", *full["seconds"], "peak rise in training"]
    size = f"V = {found['vocabulary']:,}, D = {found['width']}, {found['threads']} threads, float32"
    said = f"`{found['command']}`: {size}, training on {found['tokens']} tokens; medians of {found['rounds']} rounds."
    return f"{table(head, rows)}\n\n{said} Speed-ups over the matrix in brackets."


@generated
def memory(path: str) -> str:
    """Long-context decoding: speed, time to the first token, and capacity."""
    found = read(path)
    parts = []
    for name, row in sorted(found["rows"].items(), key=_place):
        kind, number, *batch = name.split()
        if kind == "decode":
            title = f"{int(number):,} tokens, batch {batch[1]}"
            head = ["cache", "ms per token", "tokens/s", "speed-up", "attention speed-up", "of bandwidth bound"]
            head += ["MB read", "peak MB", "bit-identical"]
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
            title = f"tokens that fit into {int(number) / 2**20:.0f} MiB in addition to the model"
            head = ["cache, numbers", "tokens", "relative to DynamicCache"]
            base = {side.split()[-1]: one["tokens"] for side, one in row.items() if side.startswith("DynamicCache")}
            lines = [
                (f"`{side}`", f"{one['tokens']:,}", f"{one['tokens'] / base[side.split()[-1]]:.1f} ×")
                for side, one in row.items()
            ]
        parts.append(f"**{title[0].upper()}{title[1:]}**\n\n{table(head, lines)}")
    rates = found["rates"]
    about = (
        f"`{found['command']}`: {rates['parameters'] / 1e6:.3g} M parameters, float32, {found['threads']} threads, medians of "
        f"{found['rounds']} interleaved rounds; each call measures the memory bandwidth for its bounds. A speed-up is the "
        "median of the ratios within a round, so it differs from the ratio of the median times."
    )
    return "\n\n".join([*parts, about])


def _place(item: tuple[str, Any]) -> tuple[int, ...]:
    """Sort key: decoding first, by batch and tokens."""
    kind, number, *batch = item[0].split()
    return (("decode", "first", "capacity").index(kind), int(batch[-1]) if batch else 0, int(number))


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


@generated
def training_floor(path: str) -> str:
    """Time of a training step by kind of operation."""
    found = read(path)
    rows = [
        (
            name,
            *(f"{100 * row['share'][kind]:.0f} %" for kind in ("products", "attention", "rest")),
            f"{row['at_most_faster']:.1f} ×",
        )
        for name, row in found["rows"].items()
    ]
    head = ["pair", "matrix products", "fused attention", "everything else", "largest possible speed-up at equal FLOPs"]
    return f"{table(head, rows)}\n\n`{found['command']}`, {found['threads']} threads."


@generated
def small_products(path: str) -> str:
    """Decoding steps and products of a few rows with torch's products and the native kernel."""
    found = read(path)
    kinds = ("torch", "native", "native int8")

    def step(rows: str, one: dict[str, float]) -> tuple[str, ...]:
        times = (f"{1000 * one[kind]:.1f} ({one['torch'] / one[kind]:.2f} ×)" for kind in kinds)
        return rows, *times, f"{1000 * one['read']:.1f}"

    def product(name: str, rows: str, one: dict[str, float]) -> tuple[str, ...]:
        size = " × ".join(map(str, found["shapes"][name]))
        rates = (f"{found['bytes_per_weight'][kind] * one[kind] / 1e9:.1f}" for kind in (*kinds, "read"))
        return f"{name} ({size})", rows, *rates

    steps = [step(rows, one) for rows, one in found["step_seconds"].items()]
    products = [
        product(name, rows, one)
        for name, all_rows in found["weights_per_second"].items()
        for rows, one in all_rows.items()
    ]
    head = ["sequences", *(f"{kind}, ms a step" for kind in kinds), "reading the weights, ms"]
    about = (
        f"`{found['command']}`: {found['instruction_set']}, {found['threads']} threads, torch {found['torch']}, medians of "
        f"{found['rounds']} interleaved rounds, load average {found['load_average']:.1f}. Speed-ups over torch in brackets."
    )
    rates = table(["matrix", "rows", *(f"{kind}, GB/s" for kind in kinds), "reading, GB/s"], products)
    return f"{table(head, steps)}\n\n{rates}\n\n{about}"


@generated
def decode_step(path: str) -> str:
    """A decode step with each cache, compared with the faster one of transformers' caches."""
    found = read(path)
    settings = found["results"]
    names = list(next(iter(settings.values()))["caches"])

    def cell(row: dict[str, float]) -> str:
        return f"{1000 * row['seconds']:.1f} ({row['over_faster']:.2f})"

    def floor(row: dict[str, float]) -> str:
        return f"{1000 * row['floor_seconds']:.0f}"

    rows = [(f"`{name}`", *(cell(one["caches"][name]) for one in settings.values())) for name in names]
    floors = [(f"`{name}`", *(floor(one["caches"][name]) for one in settings.values())) for name in names]
    head = ["cache", *(name.replace(" x ", " × ") for name in settings)]
    rates = [one["bytes_per_second"] / 1e9 for one in settings.values()]
    about = (
        f"`{found['command']}`: {found['threads']} thread, torch {found['torch']}, processor time, the best of "
        f"{found['rounds']} interleaved rounds, load average {found['load_average']:.1f}; read rate {min(rates):.1f} to "
        f"{max(rates):.1f} GB/s."
    )
    times = (
        "Milliseconds per step at tokens × sequences; in brackets the ratio to the faster one of transformers' caches:"
    )
    least = "The floor, milliseconds for reading weights and cache once:"
    return "\n\n".join((times, table(head, rows), least, table(head, floors), about))


@generated
def prompts(path: str) -> str:
    """Tokens per second of reading prompts in each precision, with the loss of quality."""
    found = read(path)
    base = found["nats_per_token"]["float32"]

    def rate(tokens: str, name: str) -> str:
        times = found["seconds"][tokens]
        return f"{int(tokens) / times[name]:.0f} ({times['float32'] / times[name]:.2f} ×)"

    def loss(name: str) -> str:
        nats = found["nats_per_token"].get(name)
        return "" if nats is None else f"{nats:.4f} ({100 * (nats / base - 1):+.2f} %)"

    names = next(iter(found["seconds"].values()))
    rows = [(name, *(rate(tokens, name) for tokens in found["seconds"]), loss(name)) for name in names]
    head = ["weights", *(f"{tokens} tokens, tokens/s" for tokens in found["seconds"]), "nats per token"]
    has = "with" if found["bfloat16_instructions"] else "without"
    about = (
        f"`{found['command']}`: {found['instructions']}, {has} instructions for bfloat16, 1 thread, torch {found['torch']}, "
        f"processor time, medians of {found['rounds']} interleaved rounds, load average {found['load_average']:.1f}; the loss "
        f"is that of {found['scored_tokens']:,} tokens of Python's own library. In brackets: compared with float32."
    )
    return f"{table(head, rows)}\n\n{about}"

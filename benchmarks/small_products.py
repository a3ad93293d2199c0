"""Products of 1 to 8 rows: the native kernel, torch's `F.linear`, and the time that reading the weights takes.

    python benchmarks/small_products.py                              about three minutes on two quiet cores
    python benchmarks/small_products.py --threads 1 --clock cpu      on a busy machine: time of the thread, not of the clock

The shapes are those of the default model (SmolLM2, 135M parameters); its weights are random here, because times do not depend
on them. Each product runs over copies of the matrix that together exceed the caches. Variants alternate within a round, and
times are medians over rounds, so ratios hold on a busy machine while seconds do not. The read rate of the memory is that of
`torch.sum` over a large tensor in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.run_folder import write_atomic
from pondera.kernels.int8 import quantized, use_int8
from pondera.kernels.linear import use_kernels
from pondera.kernels.products import few_rows, instruction_set, why_not_used

BACKBONE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 2, 4, 8)
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
COPIES = 1 << 27
"""Bytes of all copies of a matrix in float32, about."""
BYTES = {"torch": 4, "native": 4, "native int8": 1, "read": 4}
PROMPT = 64


def medians(variants: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each variant; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, work in variants.items():
            start = clock()
            work()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def products(outputs: int, inputs: int, rows: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Weights per second, by variant, over copies of a matrix."""
    copies = max(1, COPIES // (4 * outputs * inputs))
    weights = [torch.randn(outputs, inputs) for _ in range(copies)]
    codes = [quantized(weight) for weight in weights]
    x, whole = torch.randn(1, rows, inputs), torch.cat(weights)

    def with_torch() -> None:
        for weight in weights:
            F.linear(x, weight)

    def natively() -> None:
        for weight in weights:
            few_rows(x, weight)

    def with_int8() -> None:
        for code, scale in codes:
            few_rows(x, code, None, scale)

    found = medians(
        {"torch": with_torch, "native": natively, "native int8": with_int8, "read": whole.sum}, rounds, clock
    )
    return {name: outputs * inputs * copies / seconds for name, seconds in found.items()}


def steps(models: dict[str, AdaptiveLM], rows: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a decoding step of `rows` sequences, by variant, and of reading the float32 weights."""
    prompt = torch.randint(BACKBONE["vocab_size"], (rows, PROMPT))
    caches = {name: model.new_cache() for name, model in models.items()}
    for name, model in models.items():
        model(prompt, past_key_values=caches[name], logits_to_keep=1)

    def step(name: str) -> Callable[[], Any]:
        return lambda: models[name](prompt[:, :1], past_key_values=caches[name])

    read = torch.cat([parameter.flatten() for parameter in models["torch"].parameters()]).sum
    return medians({**{name: step(name) for name in models}, "read": read}, rounds, clock)


def built() -> dict[str, AdaptiveLM]:
    """The model, once for each variant."""
    plain = AdaptiveLM(AdaptiveConfig(backbone=BACKBONE)).eval()
    native, int8 = copy.deepcopy(plain), copy.deepcopy(plain)
    use_kernels(native, "native")
    use_int8(int8)
    return {"torch": plain, "native": native, "native int8": int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of the thread, so with one thread only")
    parser.add_argument("--out", type=Path, default=Path("results/small-products.json"))
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit("--clock cpu measures one thread; add --threads 1")
    clock = CLOCKS[args.clock]
    if reason := why_not_used():
        raise SystemExit(f"no native products here: {reason}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rates = {
            name: {str(rows): products(*shape, rows, args.rounds, clock) for rows in ROWS}
            for name, shape in SHAPES.items()
        }
        for name, by_rows in rates.items():
            for rows, one in by_rows.items():
                print(
                    f"{name}, {rows} rows", {kind: f"{BYTES[kind] * rate / 1e9:.1f} GB/s" for kind, rate in one.items()}
                )
        models = built()
        times = {str(rows): steps(models, rows, args.rounds, clock) for rows in ROWS}
        for rows, one in times.items():
            print(f"step, {rows} rows", {name: f"{1000 * seconds:.1f} ms" for name, seconds in one.items()})
    result = {
        "command": f"python benchmarks/small_products.py --threads {args.threads} --clock {args.clock}",
        "machine": platform.machine(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[1],
        "shapes": SHAPES,
        "bytes_per_weight": BYTES,
        "weights_per_second": rates,
        "step_seconds": times,
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Long-context decoding: KV cache methods compared with transformers' caches, kvpress and the memory bandwidth, in one run.

    pip install optimum-quanto==0.2.7                 # in Pondera's environment, for transformers' quantized cache
    python -m venv kvpress
    kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5     # it needs an older transformers
    python benchmarks/memory.py --kvpress kvpress/bin/python --contexts 4096 16384 --out results/memory.json

The model is a random Llama with 107M parameters, 8 query heads, 2 KV heads and head width 128. A cache is filled with random
keys and values, because a real prefill would take minutes, and then decodes token by token. The sides take turns in rounds;
seconds are medians, ratios are medians of the ratios per round. kvpress runs in a process of its own.

``attention`` is the time in caches and attention functions alone. ``floor`` is the time to read all weights and the cache at
the memory bandwidth of the machine, the higher of a sum and a copy of 512 MiB. Peak memory is the rise of the resident set
while decoding, above its value before the cache was filled (Linux). ``first`` prefills a prompt and generates one token.
``capacity`` limits the memory of a process to ``--room`` bytes in addition to model and libraries; it fills the cache and
decodes until the memory is full. Rows that are already in the file are not measured again. ``--model`` replaces the random
Llama by a trained one (from ``pondera train``); kvpress and ``capacity`` are then skipped.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory_caches import PRESS, STOCK, build_model, fill, grow, held_bytes, new_cache
from process import Process

MEMORIES = ("PreallocatedCache()", "PreallocatedCache(exact=False)", "StreamingLLM(0.25)", "H2O(0.25)", "VQKV()")
READERS = ("SnapKV(0.25)", "FastKV(SnapKV(0.25), tsp=0.2)", "LazyLLM()")
"""Further methods for ``first``; after prefill they decode like the others."""
# one process


class Clock:
    """Accumulates the time spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return measured


def resident(kind: str) -> int:
    """Memory of this process: ``"VmRSS"`` is the current value, ``"VmHWM"`` the peak, ``"VmSize"`` the address space."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


class Worker:
    """Fills caches and decodes on request."""

    def __init__(self, threads: int, trained: str | None = None) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.clock, self.model = Clock(), build_model(trained=trained)
        self.sides: dict[str, tuple[str, Any, torch.Tensor]] = {}
        self.timed: set[str] = set()
        self._time("sdpa")

    def _time(self, name: str) -> None:
        if name in self.timed:
            return
        self.timed.add(name)
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        AttentionInterface.register(name, self.clock.timed(ALL_ATTENTION_FUNCTIONS[name]))

    def machine(self) -> dict[str, Any]:
        """The memory bandwidth in bytes per second, and the bytes of weights that each token reads."""
        numbers = torch.ones(2**27)
        copy = torch.empty_like(numbers)
        rates = []
        for work, size in ((numbers.sum, numbers.nbytes), (lambda: copy.copy_(numbers), 2 * numbers.nbytes)):
            work()
            rates.append(max(size / seconds(work) for _ in range(5)))
        weights = sum(p.nbytes for p in self.model.parameters()) - self.model.get_input_embeddings().weight.nbytes
        return {"read": rates[0], "copy": rates[1], "weights": weights, "parameters": self.model.num_parameters()}

    def prepare(self, side: str, tokens: int, batch: int) -> dict[str, Any]:
        """Fills a cache and decodes three tokens; returns a digest of their logits and the memory of the cache."""
        self.sides.pop(side, None)
        trim()
        before = resident("VmRSS")
        cache = new_cache(side, self.model, tokens)
        fill(side, cache, self.model.config, tokens // 4 if side == PRESS else tokens, batch)
        implementation = self.model.config._attn_implementation
        self._time(implementation)
        cache.update = self.clock.timed(cache.update)
        self.sides[side] = (implementation, cache, torch.full((batch, 1), tokens))
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        logits = self._decode(side, 3)
        return {
            "peak": max(0, resident("VmHWM") - before),
            "held": held_bytes(cache),
            "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        }

    def _decode(self, side: str, tokens: int) -> torch.Tensor:
        implementation, cache, position_B1 = self.sides[side]
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
        x_B1, logits = torch.zeros_like(position_B1), []
        for _ in range(tokens):
            logits_BV = self.model(x_B1, position_ids=position_B1, past_key_values=cache).logits[:, -1]
            x_B1 = logits_BV.argmax(-1, keepdim=True)
            position_B1 += 1
            logits.append(logits_BV)
        return torch.stack(logits)

    def go(self, side: str, tokens: int) -> dict[str, float]:
        """Seconds per token: in total and in attention."""
        self._decode(side, 1)
        self.clock.seconds = 0.0
        total = seconds(lambda: self._decode(side, tokens))
        return {"total": total / tokens, "attention": self.clock.seconds / tokens}

    def release(self) -> dict[str, Any]:
        """Frees all caches."""
        self.sides = {}
        trim()
        return {}

    def first(self, side: str, tokens: int) -> dict[str, Any]:
        """Prefills a prompt and generates one token."""
        x_1T = torch.randint(self.model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        cache = new_cache(side, self.model, tokens)
        trim()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

        def read() -> None:
            if side == PRESS:
                from kvpress import StreamingLLMPress

                with StreamingLLMPress(compression_ratio=0.75)(self.model):
                    self.model(x_1T, past_key_values=cache, logits_to_keep=1)
            else:
                self.model(x_1T, past_key_values=cache, logits_to_keep=1)

        total = seconds(read)
        return {"seconds": total, "peak": max(0, resident("VmHWM") - before)}

    def serve(self) -> None:
        """Answers each line of JSON with one line of JSON."""
        answers, sys.stdout = sys.stdout, sys.stderr  # keeps prints of libraries out of the answers
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(self, request.pop("do"))(**request)
            except Exception as error:  # a side that cannot do something is a result
                answer = {"unable": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps(answer), file=answers, flush=True)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def trim() -> None:
    """Returns freed memory to the system, so that the resident set shows the memory in use."""
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


# capacity


def capacity(side: str, room: int, dtype: str, step: int = 1024) -> dict[str, Any]:
    """Fills a cache by `step` tokens at a time, with a decoding step after each, until the memory is full."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = build_model(getattr(torch, dtype))
    cache, tokens = new_cache(side, model, 0), 0
    model(torch.zeros(1, 8, dtype=torch.long))  # warm-up: allocates the one-time memory of libraries
    trim()
    limit = resident("VmSize") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        while True:
            grow(side, cache, step, model.dtype)
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
            tokens += step + 1
    except (RuntimeError, MemoryError) as error:
        return {"tokens": tokens, "ended": str(error).splitlines()[0][:120]}


# the comparison


def measure(
    tokens: int, batch: int, workers: dict[str, Process], machine: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Measures all sides at one length."""
    sides = [*STOCK, *MEMORIES, *([PRESS] if "kvpress" in workers else [])]
    ask = {side: workers["kvpress" if side == PRESS else "ours"].ask for side in sides}
    asked = {side: ask[side](do="prepare", side=side, tokens=tokens, batch=batch) for side in sides}
    able = [side for side in sides if "unable" not in asked[side]]
    each: dict[str, list[dict[str, float]]] = {side: [] for side in able}
    new = 8 if tokens * batch <= 2**15 else 3
    for number in range(rounds):
        for side in able if number % 2 else reversed(able):
            answer = ask[side](do="go", side=side, tokens=new)
            if "unable" in answer:
                raise SystemExit(f"{side} failed after its preparation: {answer['unable']}")
            each[side].append(answer)
    for worker in workers.values():
        worker.ask(do="release")
    base = each["DynamicCache"]
    found: dict[str, Any] = {side: asked[side] for side in sides if side not in able}
    for side in able:
        floor = (machine["weights"] + asked[side]["held"]) / max(machine["read"], machine["copy"])
        total, attention = (statistics.median(one[kind] for one in each[side]) for kind in ("total", "attention"))
        found[side] = {
            "milliseconds_per_token": 1e3 * total,
            "tokens_per_second": batch / total,
            "attention_milliseconds": 1e3 * attention,
            "times_as_fast_as_dynamic": _ratio(base, each[side], "total"),
            "attention_times_as_fast": _ratio(base, each[side], "attention"),
            "floor_milliseconds": 1e3 * floor,
            "share_of_floor": floor / total,
            "held_bytes": asked[side]["held"],
            "peak_bytes": asked[side]["peak"],
            "same_bits_as_dynamic": asked[side]["digest"] == asked["DynamicCache"]["digest"],
        }
    return found


def _ratio(base: list[dict[str, float]], ours: list[dict[str, float]], kind: str) -> float:
    return statistics.median(a[kind] / b[kind] for a, b in zip(base, ours, strict=True))


def show(name: str, row: dict[str, Any]) -> None:
    print(name)
    for side, one in row.items():
        text = one.get("unable") or "  ".join(
            f"{key} {value:.4g}" for key, value in one.items() if isinstance(value, (int, float))
        )
        print(f"  {side:24} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", help="python of an environment with kvpress (default: not measured)")
    parser.add_argument(
        "--model", help="run or folder of a trained Llama that replaces the random one; its cache is random too"
    )
    parser.add_argument("--out", type=Path, default=Path("results/memory.json"))
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 16384, 32768, 65536])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--most", type=int, default=2**17, help="maximum tokens of a batch, over all sequences")
    parser.add_argument("--first", type=int, nargs="*", default=[4096], help="lengths of prompts")
    parser.add_argument("--room", type=int, default=2**29, help="memory for capacity in bytes; 0: not measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each side; the sides take turns"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--capacity", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        Worker(args.threads, args.model).serve()
        return
    if args.capacity:
        print(json.dumps(capacity(args.capacity[0], args.room, args.capacity[1])))
        return

    from pondera.core.run_folder import write_atomic

    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": {}}
    rows = result["rows"]
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        show(name, row)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")

    lengths = [(tokens, batch) for batch in args.batches for tokens in args.contexts if tokens * batch <= args.most]
    wanted = {f"decode {tokens} x {batch}": (tokens, batch) for tokens, batch in lengths}
    wanted_first = {f"first {tokens}": tokens for tokens in args.first}
    if {*wanted, *wanted_first} - {*rows}:
        pythons = {"ours": sys.executable} | ({"kvpress": args.kvpress} if args.kvpress and not args.model else {})
        words = ("--model", args.model) if args.model else ()
        workers = {name: Process(__file__, python, args.threads, *words) for name, python in pythons.items()}
        machine = workers["ours"].ask(do="machine")
        about = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": args.threads,
            "rounds": args.rounds,
        }
        option = f" --model {Path(args.model).name}" if args.model else ""
        result |= {"command": f"python benchmarks/memory.py{option}", "rates": machine, **about}
        for name, (tokens, batch) in wanted.items():
            if name not in rows:
                keep(name, measure(tokens, batch, workers, machine, args.rounds))
        for name, tokens in wanted_first.items():
            if name not in rows:
                sides = [*STOCK, *MEMORIES, *READERS, *([PRESS] if "kvpress" in workers else [])]
                asked = {
                    side: workers["kvpress" if side == PRESS else "ours"].ask(do="first", side=side, tokens=tokens)
                    for side in sides
                }
                keep(name, asked)
        for worker in workers.values():
            worker.close()
    name = f"capacity {args.room}"
    if args.room and not args.model and name not in rows:
        found = {}
        for dtype in ("float32", "bfloat16"):
            for side in (
                "DynamicCache",
                "PreallocatedCache()",
                *MEMORIES[2:],
            ):  # PreallocatedCache(exact=False) needs the same memory as PreallocatedCache()
                command = [sys.executable, __file__, "--room", str(args.room), "--capacity", side, dtype]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                last = done.stdout.splitlines()[-1:] or ['{"unable": "ended by the system"}']
                found[f"{side} {dtype}"] = json.loads(last[0])
        keep(name, found)


if __name__ == "__main__":
    main()

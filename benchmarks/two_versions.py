"""Decoding and training speed of two source trees of Pondera, interleaved in one run.

    git worktree add ../before v0 && python -m benchmarks.two_versions --before ../before/src --rounds 7

Each tree runs in a process of its own. A round asks both for the same piece of work, first one, then the other, and the next
round in the other order. Writes ``results/two-versions.json``: medians of the times, and ratios (above 1: this tree is
faster). ``calls`` counts Python calls in Pondera of one decode step of H2O over two layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2)
JOBS = ("decode PreallocatedCache", "decode H2O", "decode PonderLM2", "decode AdaptiveLatentCoT", "train plain",
        "train PonderLM2", "train AdaptiveLatentCoT")  # fmt: skip
CONTEXT, TOKENS = 1024, 24


def spec_of() -> tuple[Any, str]:
    """The spec module of a tree, and what it calls the seam of KV-cache methods."""
    try:
        from pondera.core import spec
    except ImportError:
        from pondera.ground import spec  # type: ignore[no-redef, import-not-found]

        return spec, "memory"
    return spec, "kv_cache"


def work(job: str) -> float:
    """Seconds that a piece of work takes."""
    import torch

    from pondera import AdaptiveConfig, AdaptiveLM

    kind, name = job.split()
    torch.manual_seed(0)
    think = {
        "PonderLM2": "PonderLM2(thoughts=1)",
        "AdaptiveLatentCoT": "AdaptiveLatentCoT(steps=2, halting='fixed')",
    }.get(name)
    key = job.partition(" ")[2] + kind
    if key not in MODELS:
        backbone = {"model_type": "llama", "vocab_size": 2048, "max_position_embeddings": 4096, **SIZES}
        MODELS[key] = AdaptiveLM(AdaptiveConfig(backbone=backbone, think=think))
    model = MODELS[key]
    if kind == "train":
        model.train()
        ids = torch.randint(2048, (4, 256))
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
        return time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        cache = model.new_cache() if think else method(name).cache(model.backbone.lm)
        runner = model if think else model.backbone.lm
        runner(torch.randint(2048, (1, CONTEXT)), past_key_values=cache)
        began = time.perf_counter()
        for _ in range(TOKENS):
            runner(torch.randint(2048, (1, 1)), past_key_values=cache)
        return (time.perf_counter() - began) / TOKENS


MODELS: dict[str, Any] = {}


def method(name: str) -> Any:
    """A KV-cache method, by its name in either tree."""
    spec, seam = spec_of()
    if name == "PreallocatedCache":
        return spec.build("PreallocatedCache()" if seam == "kv_cache" else "Full()", seam)
    return spec.build(f"{name}({CONTEXT // 2})", seam)


def calls() -> int:
    """Python calls in Pondera of one decode step of H2O over two layers."""
    from python_calls import calls_of_step

    return calls_of_step(method("H2O"), prompt=600).total()


def serve() -> None:
    """Answers one job per line with its seconds."""
    for line in sys.stdin:
        job = line.strip()
        print(json.dumps(calls() if job == "calls" else work(job)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="src folder of the older tree")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    trees = {"before": args.before, "now": Path(__file__).parents[1] / "src"}
    workers = {}
    for name, tree in trees.items():
        env = {**os.environ, "PYTHONPATH": str(tree.resolve()), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )

    def ask(name: str, job: str) -> float:
        worker = workers[name]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(job + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    rows = {}
    for job in JOBS:
        times: dict[str, list[float]] = {name: [] for name in trees}
        for number in range(args.rounds + 1):
            for name in list(trees)[:: 1 if number % 2 else -1]:
                seconds = ask(name, job)
                if number:  # the first round warms up
                    times[name].append(seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        rows[job] = {
            **{f"{name}_ms": 1e3 * value for name, value in median.items()},
            "ratio": median["before"] / median["now"],
        }
        print(job, {key: round(value, 3) for key, value in rows[job].items()}, flush=True)
    found = {
        "command": "python -m benchmarks.two_versions --before ../before/src",
        "rounds": args.rounds,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "calls": {name: ask(name, "calls") for name in trees},
        "jobs": rows,
    }
    Path("results/two-versions.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found["calls"])


if __name__ == "__main__":
    main()

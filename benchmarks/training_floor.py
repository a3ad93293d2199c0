"""Time of a training step by kind of operation, and the maximum speed-up with the same arithmetic.

    python benchmarks/training_floor.py --out results/training-floor.json      two minutes on two cores

The models and batches are those of `benchmarks/authors.py`. The method determines the matrix products and fused attention,
and the same libraries run them in any implementation. Better code could save at most the rest. Times are self times of
torch's profiler over some steps after a warm-up. Shares are ratios within a step, so other load hardly changes them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from authors import PAIRS, Pair
from torch.profiler import ProfilerActivity, profile

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.run_folder import write_atomic
from pondera.cost.measure import measured_flops

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = "scaled_dot_product"


def measure(pair: Pair, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Shares of the time of some training steps by kind of operation."""
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(pair.backbone), think=pair.think, init="scaled")).train()
    x_BT = torch.randint(pair.backbone["vocab_size"], (batch, context), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad()
        model(x_BT, labels=x_BT).loss.backward()

    flops = measured_flops(step)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    seconds = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in found.key_averages():
        kind = "products" if event.key in PRODUCTS else "attention" if ATTENTION in event.key else "rest"
        seconds[kind] += event.self_cpu_time_total / 1e6
    total = sum(seconds.values())
    return {
        "think": pair.think,
        "train_flops_per_token": flops / batch / context,
        "share": {kind: value / total for kind, value in seconds.items()},
        "at_most_faster": total / (seconds["products"] + seconds["attention"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results/training-floor.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {}
    for name in list(PAIRS)[:2]:  # the others differ from the authors' code in their arithmetic
        rows[name] = measure(PAIRS[name], args.batch, args.context, args.steps)
        print(name, {kind: f"{share:.0%}" for kind, share in rows[name]["share"].items()}, flush=True)
    result = {
        "command": "python benchmarks/training_floor.py",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "batch": args.batch,
        "context": args.context,
        "rows": rows,
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

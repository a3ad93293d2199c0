"""Time and memory of VQ-Logits heads compared with the full output matrix, in one run.

    python benchmarks/heads.py --out results/heads.json

Tasks: logits of one state, logits of many states, and a training step of the loss (forward and backward). A head with one
group needs no tensor of vocabulary width in training. The heads take turns; seconds are medians over rounds, ratios are
medians of the ratios per round. Memory: the bytes of a head (weights, and the map from tokens to codes), and the rise of the
resident set of the process in a training step, including gradients (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from process import resident
from torch import nn

from pondera.core.run_folder import write_atomic
from pondera.methods.head.vq_logits import VQLogits
from pondera.models.next_token import next_token_term


def seconds(job: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def tasks(head: nn.Module, width: int, vocabulary: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """The tasks to time."""
    one_BTD, many_BTD = torch.randn(1, 1, width), torch.randn(1, tokens, width)
    labels_BT = torch.randint(vocabulary, (1, tokens))

    def logits(h_BTD: torch.Tensor) -> None:
        with torch.no_grad():
            head(h_BTD)

    def learn() -> None:
        head.zero_grad(set_to_none=True)  # accumulating gradients would cost the full matrix more time
        h_BTD = many_BTD.clone().requires_grad_()
        loss = head.term(h_BTD, labels_BT) if isinstance(head, VQLogits) else next_token_term(head(h_BTD), labels_BT)
        loss.mean().backward()

    return {"logits of 1": lambda: logits(one_BTD), f"logits of {tokens}": lambda: logits(many_BTD), "training": learn}


def rise(job: Callable[[], Any]) -> int | None:
    """The rise of the resident set during a job, in bytes."""
    before = resident("VmRSS")
    if before is None:
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    job()
    peak = resident("VmHWM")
    return None if peak is None else max(0, peak - before)


def state_bytes(head: nn.Module) -> int:
    """Bytes of weights and maps."""
    return sum(tensor.nbytes for tensor in head.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results/heads.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads: dict[str, nn.Module] = {"full": nn.Linear(args.width, args.vocabulary, bias=False)}
    for codes, groups in ((512, 1), (4096, 1), (512, 4), (4096, 4)):
        head = VQLogits(codes, groups)
        head.bind(args.vocabulary, args.width)
        heads[f"VQLogits(codes={codes}, groups={groups})"] = head
    jobs = {name: tasks(head, args.width, args.vocabulary, args.tokens) for name, head in heads.items()}
    memory: dict[str, int | None] = {}
    for name, own in jobs.items():
        own["training"]()  # warm-up: libraries allocate their one-time memory here
        heads[name].zero_grad(set_to_none=True)
        memory[name] = rise(own["training"])
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):
        for name, own in jobs.items():
            for task, job in own.items():
                took = seconds(job)
                if number:  # the first round is a warm-up
                    times.setdefault((name, task), []).append(took)
    rows = [
        {
            "head": name,
            "parameters": sum(p.numel() for p in heads[name].parameters()),
            "bytes": state_bytes(heads[name]),
            "training_bytes": memory[name],
            "seconds": {task: statistics.median(times[name, task]) for task in own},
            "faster": {
                task: statistics.median(a / b for a, b in zip(times["full", task], times[name, task], strict=True))
                for task in own
            },
        }
        for name, own in jobs.items()
    ]
    for row in rows:
        print(row["head"], f"{row['parameters']:,}", {task: f"{value:.2f} x" for task, value in row["faster"].items()})
    settings = {name: getattr(args, name) for name in ("vocabulary", "width", "tokens", "rounds", "threads")}
    result = {"command": "python benchmarks/heads.py", "machine": platform.machine(), "torch": torch.__version__}
    result |= {**settings, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Speed of packed passes compared with the dense reference implementation, in one run.

    python benchmarks/packing.py --out results/packing.json

Every method that halts tokens runs with random halting, so that the share of active tokens is known and no training is
needed. Tasks: prefill, a training step, and decoding, at batch 1 and 16. ``dense`` runs all rows in every pass under a mask;
``packed`` runs only the active rows. With at most n passes and m on average, the ideal is packed = m/n x dense; the result
is the ratio to this ideal (target: at most 1.15). The model is a Llama of about 25M parameters, so that matrix products
dominate, not Python. Rounds are interleaved; results are medians of the ratios per round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.run_folder import write_atomic

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
METHODS = {
    "AdaptiveLatentCoT": "AdaptiveLatentCoT(steps=3, halting='random', continue_prob=0.5)",
    "AdaPonderLM": "AdaPonderLM(steps=3, halting='random', continue_prob=0.5)",
    "PonderLM3": "PonderLM3(thoughts=3, halting='random', continue_prob=0.5)",
    "ThinkAtHard": "ThinkAtHard(steps=1, halting='random', continue_prob=0.25)",
    "UniversalTransformer": "UniversalTransformer(steps=3, halting='random', continue_prob=0.5)",
}
TRAINED_SOFT = {"PonderLM3"}  # its training is dense by definition, so packing saves nothing
PROMPT, NEW = {1: 256, 16: 64}, {1: 24, 16: 12}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prefill(model: AdaptiveLM, x_BT: torch.Tensor) -> Callable[[], float]:
    """Prefills a new cache; returns the mean passes."""

    def work() -> float:
        with torch.no_grad():
            return float(model(x_BT, past_key_values=model.new_cache(), logits_to_keep=1).passes.double().mean())

    return work


def training(model: AdaptiveLM, x_BT: torch.Tensor) -> Callable[[], float]:
    """Runs a forward and a backward pass; returns the mean passes."""

    def work() -> float:
        model.train().zero_grad(set_to_none=True)
        out = model(x_BT, labels=x_BT)
        out.loss.backward()
        model.eval()
        return float(out.passes.double().mean())

    return work


def decoding(model: AdaptiveLM, x_BT: torch.Tensor, new: int) -> Callable[[], float]:
    """Decodes tokens one by one after a prompt, with different positions per sequence; returns the mean passes."""
    length = x_BT.shape[1]
    mask_BT = torch.ones(x_BT.shape[0], length + new, dtype=torch.long, device=x_BT.device)
    for row in range(x_BT.shape[0]):
        mask_BT[row, :row] = 0
    with torch.no_grad():
        model.think.packed = True
        filled = model.new_cache()
        model(x_BT, attention_mask=mask_BT[:, :length], past_key_values=filled, logits_to_keep=1)

    def work() -> float:
        passes = []
        with torch.no_grad():
            for step in range(new):
                seen = length + step + 1
                out = model(x_BT[:, :1], attention_mask=mask_BT[:, :seen], past_key_values=filled)
                passes.append(float(out.passes.double().mean()))
        filled.crop(-new)
        return statistics.mean(passes)

    return work


def compare(model: AdaptiveLM, work: Callable[[], float], rounds: int) -> dict[str, float]:
    """Dense and packed seconds, and the ratio of the packed time to the ideal."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for packed in (False, True):
        model.think.packed = packed
        mean = work()
    for _ in range(rounds):
        for packed, taken in seconds.items():
            model.think.packed = packed
            taken.append(timed(work))
    share = mean / model.passes()
    ratios = [packed / (share * dense) for dense, packed in zip(seconds[False], seconds[True], strict=True)]
    return {
        "mean_passes": mean,
        "passes": model.passes(),
        "dense_seconds": statistics.median(seconds[False]),
        "packed_seconds": statistics.median(seconds[True]),
        "over_arithmetic": statistics.median(ratios),
        "spread": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/packing.json"))
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[dict[str, object]] = []
    for name in args.methods:
        torch.manual_seed(0)
        model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONE), think=METHODS[name])).to(device).eval()
        for batch in (1, 16):
            x_BT = torch.randint(4096, (batch, PROMPT[batch]), generator=torch.Generator().manual_seed(0)).to(device)
            tasks = {"prefill": prefill(model, x_BT), "decode": decoding(model, x_BT, NEW[batch])}
            if name not in TRAINED_SOFT:
                tasks["train"] = training(model, x_BT)
            for task, work in tasks.items():
                row = {"method": name, "spec": METHODS[name], "task": task, "batch": batch}
                row |= compare(model, work, args.rounds)
                found.append(row)
                print(
                    f"{name:22}{task:8} batch {batch:2}  {row['mean_passes']:.2f} of {row['passes']:.0f} passes  "
                    f"dense {row['dense_seconds']:.3f} s  packed {row['packed_seconds']:.3f} s  "
                    f"{row['over_arithmetic']:.2f} x the ideal",
                    flush=True,
                )
    result = {
        "command": f"python benchmarks/packing.py --rounds {args.rounds}",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "backbone": BACKBONE,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rows": found,
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

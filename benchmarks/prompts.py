"""Reading a prompt on a CPU: float32, half precision and int8, with the loss of quality of each.

    python -m benchmarks.prompts      eight minutes of one core

The model is SmolLM2 (135M parameters) on one thread. It reads random tokens in one call and computes the last token's logits.
Variants take turns, and times are medians of processor time. The loss is that of text of Python's own library, in windows of
1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.small_products import medians
from pondera.core.run_folder import write_atomic
from pondera.evaluation.perplexity import evaluate
from pondera.inference.load import Loaded, load

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, torch": {"dtype": "bfloat16", "kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "int8-prompts": {"weights": "int8-prompts"},
}
"""Arguments of `load`."""
TOKENS = (64, 512, 2048)
SCORED = 16384
"""Tokens whose loss is taken."""


def seconds(models: dict[str, Loaded], tokens: int, rounds: int) -> dict[str, float]:
    """Processor time of a prompt, by variant."""
    ids_1T = torch.randint(models["float32"].model.embedded, (1, tokens))

    def read(loaded: Loaded) -> Any:
        return lambda: loaded.model(ids_1T, logits_to_keep=1)

    with torch.inference_mode():
        return medians({name: read(loaded) for name, loaded in models.items()}, rounds, time.thread_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/prompts.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {name: load("smollm2", device="cpu", **chosen) for name, chosen in VARIANTS.items()}
    times = {str(tokens): seconds(models, tokens, args.rounds) for tokens in TOKENS}
    losses = {
        name: evaluate(loaded, {"text": "stdlib", "context": 1024}, SCORED)["loss"]
        for name, loaded in models.items()
        if name != "bfloat16, torch"
    }
    capability = torch.backends.cpu.get_cpu_capability()
    result = {
        "command": f"python -m benchmarks.prompts --rounds {args.rounds}",
        "machine": platform.machine(),
        "instructions": capability,
        "bfloat16_instructions": any(name in Path("/proc/cpuinfo").read_text() for name in ("avx512_bf16", "amx_bf16")),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[1],
        "seconds": times,
        "scored_tokens": SCORED,
        "nats_per_token": losses,
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    for tokens, by_name in times.items():
        print(f"{tokens} tokens", {name: f"{int(tokens) / one:.0f} tokens/s" for name, one in by_name.items()})
    print({name: f"{loss:.4f} nats" for name, loss in losses.items()})


if __name__ == "__main__":
    main()

"""Decoding speed of ConceptLM compared with its backbone alone, in one run.

    python benchmarks/concepts.py --out results/concepts-speed.json

Greedy decoding through `generate`, with and without concepts (k = 4; half of the layers encode; the concept module has a
quarter of the layers), at batch 1 and 8, and at batch 8 with prompts of different lengths, whose chunks end at different
tokens. Rounds are interleaved; ratios are medians of the ratios per round. FLOPs are those of a token in the middle of the
run. The measured ratio divided by the ratio of FLOPs shows the overhead of the decoding code (target: at least 0.9). The
model is the Llama of about 16M parameters from ``speed.py``, so that matrix products dominate, not Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import BACKBONE, timed

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.run_folder import write_atomic
from pondera.evaluation.cost_report import cost_report

CHUNK, LAYERS = 4, BACKBONE["num_hidden_layers"]
SEGMENT = f"ConceptLM(chunk={CHUNK}, codes=64, segments=8, encoder_layers={LAYERS // 2}, concept_layers={LAYERS // 4})"
PROMPT, NEW = 64, 128
TASKS = {"1": (1, False), "8": (8, False), "8, prompts of different lengths": (8, True)}


def built(segment: str | None) -> AdaptiveLM:
    """A model; its codebooks, if any, are initialised with one batch."""
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONE), chunk=segment))
    if segment:
        x_BT = torch.randint(BACKBONE["vocab_size"], (4, PROMPT))
        model(x_BT, labels=x_BT)
    return model.eval()


def decoding(model: AdaptiveLM, batch: int, uneven: bool) -> Callable[[], object]:
    """The task to time. Uneven prompts are left-padded, with one more padding token in each sequence."""
    x_BT = torch.randint(BACKBONE["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    padding_B = torch.arange(batch) * uneven
    mask_BT = (torch.arange(PROMPT) >= padding_B[:, None]).long()
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: model.generate(x_BT, attention_mask=mask_BT, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/concepts-speed.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    models = {"plain": built(None), "concepts": built(SEGMENT)}
    # `cost_report` assumes half a context in the cache.
    flops = {name: cost_report(model, 2 * PROMPT + NEW)["inference_flops_per_token"] for name, model in models.items()}
    by_flops = flops["plain"] / flops["concepts"]
    rows = []
    for task, (batch, uneven) in TASKS.items():
        work = {name: decoding(model, batch, uneven) for name, model in models.items()}
        taken: dict[str, list[float]] = {name: [] for name in work}
        for number in range(args.rounds + 1):
            for name in work if number % 2 else reversed(work):
                seconds = timed(work[name])
                if number:  # the first round is a warm-up
                    taken[name].append(seconds)
        ratios = [plain / concepts for plain, concepts in zip(*taken.values(), strict=True)]
        row = {
            "batch": task,
            "tokens_per_second": {name: batch * NEW / statistics.median(each) for name, each in taken.items()},
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_lowest": min(ratios),
            "speed_ratio_highest": max(ratios),
            "ratio_by_flops": by_flops,
            "speed_over_flops": statistics.median(ratios) / by_flops,
        }
        rows.append(row)
        print(f"batch {task}: {row['speed_ratio']:.3f} of plain's speed, {by_flops:.3f} by FLOPs", flush=True)
    result = {
        "command": f"python benchmarks/concepts.py --rounds {args.rounds}",
        "chunk": SEGMENT,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "prompt": PROMPT,
        "new_tokens": NEW,
        "torch": torch.__version__,
        "threads": args.threads,
        "machine": platform.machine(),
        "rounds": args.rounds,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

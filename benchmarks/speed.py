"""Speed of thinking methods compared with the plain Hugging Face model, in one run.

    python benchmarks/speed.py --out results/speed.json

Measures decoding (tokens/s, batch 1, greedy, through `generate`) and training (tokens/s of forward + backward) of the bare
transformers model, AdaptiveLM without a method, and each method, and computes the ratios that the FLOPs predict. Rounds are
interleaved; results are medians. The model is a Llama of about 16M parameters, so that matrix products dominate, not Python.
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
from transformers import LlamaConfig, LlamaForCausalLM

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core.run_folder import write_atomic
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
METHODS = {
    "plain": None,
    "PonderLM2 K=1": "PonderLM2(thoughts=1, train_rounds=(2, 2))",
    "AdaptiveLatentCoT L=1": "AdaptiveLatentCoT(steps=1, halting='fixed')",
    "PauseToken P=1": "PauseToken(pauses=1)",
}
PROMPT, NEW, BATCH, CONTEXT = 64, 128, 4, 256


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def decoding(model: torch.nn.Module) -> Callable[[], object]:
    prompt_BT = torch.randint(2048, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return lambda: model.generate(prompt_BT, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)


def training(model: torch.nn.Module) -> Callable[[], object]:
    x_BT = torch.randint(2048, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=x_BT, labels=x_BT).loss.backward()

    return step


def predicted(model: AdaptiveLM) -> dict[str, float]:
    """Analytic FLOPs of decoding one token in the middle of the run, and of training on one token."""
    prices, middle = CostModel(model.backbone.config), PROMPT + NEW // 2
    think = model.think
    one = think.cost_schedule(1, context=middle) if think else [DecoderPass(1, middle + 1, cached=True)]
    window = think.cost_schedule(CONTEXT, training=True) if think else [DecoderPass(CONTEXT, CONTEXT)]
    return {
        "decode_flops": prices.forward(CostSchedule(tuple(one), 1, 1)),
        "train_flops": prices.training(CostSchedule(tuple(window), CONTEXT, CONTEXT)) / CONTEXT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/speed.json"))
    parser.add_argument("--rounds", type=int, default=11, help="rounds of decoding; training gets a third of them")
    args = parser.parse_args()

    torch.manual_seed(0)
    bare = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in BACKBONE.items() if k != "model_type"}))
    models: dict[str, torch.nn.Module] = {"bare transformers": bare}
    models |= {
        name: AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONE), think=think)) for name, think in METHODS.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"decode": [], "train": []} for name in models}
    for task, prepare in (("decode", decoding), ("train", training)):
        work = {name: prepare(model.train(task == "train")) for name, model in models.items()}
        for name in work:
            timed(work[name])  # warm-up
        for round_number in range(rounds := args.rounds if task == "decode" else max(3, args.rounds // 3)):
            for name in work:
                seconds[name][task].append(timed(work[name]))
            print(f"{task} round {round_number + 1} of {rounds}", flush=True)

    reference = predicted(models["plain"])
    rows = {}
    for name, model in models.items():
        price = predicted(model) if isinstance(model, AdaptiveLM) else reference
        # Rounds are interleaved, so each is compared with the bare model of the same round.
        ratio = {
            task: statistics.median(
                b / a for a, b in zip(seconds[name][task], seconds["bare transformers"][task], strict=True)
            )
            for task in ("decode", "train")
        }
        rows[name] = {
            "decode_tokens_per_second": NEW / statistics.median(seconds[name]["decode"]),
            "decode_speed_ratio": ratio["decode"],
            "decode_ratio_by_arithmetic": reference["decode_flops"] / price["decode_flops"],
            "train_tokens_per_second": BATCH * CONTEXT / statistics.median(seconds[name]["train"]),
            "train_cost_ratio": 1 / ratio["train"],
            "train_cost_by_arithmetic": price["train_flops"] / reference["train_flops"],
        }
        print(f"{name:24}", "  ".join(f"{key} {value:.3g}" for key, value in rows[name].items()))
    result = {
        "command": "python benchmarks/speed.py",
        "parameters": sum(p.numel() for p in bare.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "rounds": args.rounds,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What do codes for the KV cache cost in quality? VQKV compared with scalar quantization, at equal bits.

    python -m experiments.vqkv.run --model books --text books.jsonl.xz      first trains a Llama of 2.4 M parameters
    python -m experiments.vqkv.run --model stories --text FOLDER            FOLDER has stories260K.bin and tok512.bin
    python -m experiments.vqkv.run --model books --text stdlib --smoke      a check that it runs

There are two models. One is trained here on the given text. The other is stories260K, evaluated on text that it samples itself
at temperature 1, with another seed for the held-out text. Each window is fed in chunks: its first quarter in one call, the
rest 16 tokens per call through the cache. The result is the loss on these tokens minus the loss with the stock cache. The
exact part is short (16 recent tokens and 4 sinks), so almost the whole context is coded, as in a long context.

Codebooks are calibrated at 4 bits and cut to 3 and 2 bits, which equals calibration at 3 and 2 bits. Each setting is written
when it is done; finished settings are not repeated. Results go to ``results/vqkv/MODEL.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from experiments.common.publishing import portable, write_json
from experiments.vqkv.stories260k import START, check, stories260k
from pondera.methods.kv_cache.base import compressible, head_dim
from pondera.methods.kv_cache.common.calibration import collect
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.kv_cache.kivi import KIVI
from pondera.methods.kv_cache.vqkv import VQKV

RATES = (2, 3, 4)
REGIONS: dict[str, Any] = {"window": 16, "sinks": 4, "flush_size": 16}
PIECE = 16
FITS: dict[str, dict[str, Any]] = {
    "two branches": {},
    "one branch": {"branches": 1},
    "one branch, before rotation": {"branches": 1, "key_stage": "pre_rope"},
    "two branches, before rotation": {"key_stage": "pre_rope"},
    "two branches, k-means": {"fitting": "kmeans"},
    "one branch, k-means": {"branches": 1, "fitting": "kmeans"},
}
SIZES = {
    "books": {"context": 256, "calibration": 32, "held_out": 32},
    "stories": {"context": 256, "calibration": 32, "held_out": 32},
}
BACKBONE = {
    "backbone.hidden_size": 192,
    "backbone.intermediate_size": 512,
    "backbone.num_hidden_layers": 4,
    "backbone.num_attention_heads": 6,
    "backbone.num_key_value_heads": 2,
}


@dataclass
class Task:
    """A model and its text.

    Args:
        model: frozen.
        calibration: token ids ``[B, T]`` for the codebooks.
        held_out: token ids ``[B, T + 1]`` for the loss.
        about: the description of the model in the results file.
    """

    model: PreTrainedModel
    calibration: Tensor
    held_out: Tensor
    about: dict[str, Any]

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the decoder."""
        return self.model.config.get_text_config(decoder=True)


def books(text: str, steps: int) -> Task:
    """Trains a model of the recipe ``plain`` with grouped-query attention, or loads the trained one."""
    from pondera.core.run_config import load as settings
    from pondera.data.corpus import prepare
    from pondera.inference.load import load
    from pondera.training.train import train

    size = SIZES["books"]
    given = {"data.text": text, "data.max_bytes": 4_000_000, "train.steps": steps, "train.eval_every": steps}
    config = settings("plain", {**BACKBONE, **given, "name": "vqkv-books", "train.save_every": 50})
    out = Path("runs/vqkv") / f"books-{steps}"
    run = train(config, out, resume=out.exists())
    windows, held_out = prepare(config.data).train.windows(size["context"]), prepare(config.data).validation
    measured = held_out.windows(size["context"])
    ids = [
        torch.cat([measured[n]["input_ids"], measured[n]["targets"][-1:]])
        for n in range(min(size["held_out"], len(measured)))
    ]
    calibration = torch.stack([windows[n]["input_ids"] for n in range(size["calibration"])])
    result = run.result() or {}
    about = {"parameters": result.get("parameters"), "bits_per_byte": result.get("bits_per_byte"), "steps": steps}
    return Task(load(out).model.eval(), calibration, torch.stack(ids), about)


def stories(folder: str, _: int) -> Task:
    """Loads stories260K, checks its known output, and samples the text from it."""
    size = SIZES["stories"]
    model, pieces = stories260k(Path(folder))
    check(model, pieces)
    kwargs: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    texts = []
    for seed, (count, tokens) in enumerate(
        ((size["calibration"], size["context"]), (size["held_out"], size["context"] + 1))
    ):
        torch.manual_seed(seed)
        begin = torch.full((count, 1), START)
        texts.append(model.generate(begin, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, **kwargs))
    return Task(model, texts[0], texts[1], {"parameters": sum(p.numel() for p in model.parameters())})


@torch.no_grad()
def loss(task: Task, new_cache: Callable[[], Any]) -> float:
    """Nats per token after the first quarter of each window, fed in chunks through a cache."""
    ids, targets = task.held_out[:, :-1], task.held_out[:, 1:]
    begin = ids.shape[1] // 4
    cache, total, count = new_cache(), 0.0, 0
    for piece, wanted in zip(
        (ids[:, :begin], *ids[:, begin:].split(PIECE, 1)), (None, *targets[:, begin:].split(PIECE, 1)), strict=True
    ):
        logits = task.model(piece, past_key_values=cache).logits
        if wanted is not None:
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum"))
            count += wanted.numel()
    return total / count


@torch.no_grad()
def errors(task: Task, memory: SinkWindowCache) -> dict[str, Any]:
    """Relative squared error of held-out keys and values, of keys also by dimension, and code usage."""
    config = task.config
    layers = compressible(config)
    keys, values, position_N = collect(task.model, [task.held_out[:, :-1]], layers, memory.sinks, 2**30)
    usable = len(position_N) // 32 * 32  # whole groups of quantized keys
    left = {"keys": torch.zeros(head_dim(config)), "values": torch.zeros(head_dim(config))}
    all_of = {name: torch.zeros_like(left[name]) for name in left}
    used: list[float] = []
    for index in range(len(layers)):
        for coder, x_GND, name in zip(memory.coders(config, index), (keys[index], values[index]), left, strict=True):
            x_BGSD = x_GND[None, :, :usable]
            parts = coder.encode(x_BGSD, position_N[None, :usable])
            left[name] += (coder.decode(parts, position_N[None, :usable]) - x_BGSD).square().sum((0, 1, 2))
            all_of[name] += x_BGSD.square().sum((0, 1, 2))
            if isinstance(memory, VQKV):
                codes = parts["codes"].flatten(0, 2)
                used += [len(codes[:, stage].unique()) / memory.codes for stage in range(codes.shape[1])]
    found: dict[str, Any] = {f"{name}_error": float(left[name].sum() / all_of[name].sum()) for name in left}
    found["keys_error_by_dimension"] = [round(float(x), 5) for x in left["keys"] / all_of["keys"]]
    if used:
        found["codes_used"] = sum(used) / len(used)
    return found


def settings(seeds: int) -> list[tuple[str, int]]:
    """Names and seeds of the settings; scalar quantization needs no seed."""
    return [("scalar", 0)] + [(name, seed) for seed in range(seeds) for name in FITS]


def scalars() -> dict[str, KIVI]:
    """Scalar quantization methods by name."""
    regions = {"window": 16, "sinks": 4}
    kinds = [
        (bits, group, keys) for keys in ("channel", "token") for bits, group in ((1, 32), (2, 32), (2, 16), (4, 32))
    ]
    return {
        f"{bits} bits, keys by {keys}, groups of {group}": KIVI(bits, group, keys=keys, **regions)
        for bits, group, keys in kinds
    }


def measured(task: Task, memory: SinkWindowCache, exact: float) -> dict[str, Any]:
    """One row of the results."""
    nats = loss(task, lambda: memory.cache(task.model))
    row = {"bits": memory.rate(task.config), "loss": nats, "more_than_exact": nats - exact}
    return row | errors(task, memory)


def run(task: Task, name: str, seed: int, exact: float, options: dict[str, Any]) -> list[dict[str, Any]]:
    """All rates of one setting."""
    if name == "scalar":
        return [{"name": n, "seed": None} | measured(task, m, exact) for n, m in scalars().items()]
    begun = time.perf_counter()
    memory = VQKV(max(RATES), **(REGIONS | options | FITS[name]), seed=seed).fit(
        task.model, task.calibration[:, None].unbind(0)
    )
    seconds = time.perf_counter() - begun
    rows = [
        {"name": name, "seed": seed, "asked": bits} | measured(task, memory.at(bits, task.config), exact)
        for bits in RATES
    ]
    return [row | {"seconds_to_fit": round(seconds, 1)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["books", "stories"], required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the model (default: 300)")
    parser.add_argument("--fit-steps", type=int, default=100, help="calibration steps per stage (default: 100)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", choices=["head", "layer"], default="head")
    parser.add_argument("--smoke", action="store_true", help="4 steps and one setting, to runs/smoke/ only")
    args = parser.parse_args()
    root = Path("runs/smoke") if args.smoke else Path()
    if args.smoke:
        args.steps, args.fit_steps, args.seeds = 4, 2, 1
    task = {"books": books, "stories": stories}[args.model](args.text, args.steps)
    file = root / "results/vqkv" / f"{args.model}{'' if args.width == 'head' else '-layer'}.json"
    words = [f"--model {args.model} --text {portable(args.text)}", f"--steps {args.steps} --fit-steps {args.fit_steps}"]
    known = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    exact = loss(task, lambda: DynamicCache(config=task.config))
    known |= {
        "command": f"python -m experiments.vqkv.run {' '.join(words)} --seeds {args.seeds} --width {args.width}",
        "model": task.about,
        "exact": {"loss": exact, "tokens": task.held_out[:, 1:].numel() * 3 // 4},
        "regions": REGIONS,
        "calibration_tokens": task.calibration.numel(),
    }
    done = {(row["name"] if row["seed"] is not None else "scalar", row["seed"] or 0) for row in known["rows"]}
    for name, seed in settings(args.seeds):
        if (name, seed) in done:
            continue
        options = {"steps": args.fit_steps, "width": args.width, "vectors": 16384}
        known["rows"] += run(task, name, seed, exact, options)
        write_json(file, known)
        print(
            name, seed, *(f"{row['bits']:g}: {row['more_than_exact']:+.4f}" for row in known["rows"][-3:]), flush=True
        )
    print("done")


if __name__ == "__main__":
    main()

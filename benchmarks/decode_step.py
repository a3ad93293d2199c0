"""A decode step with each cache, compared with transformers' own caches, all with the same native products.

    python -m benchmarks.decode_step --batches 1 --rounds 9 --out results/decode-step.json     about ten minutes
    python -m benchmarks.decode_step --contexts 512 --methods "H2O(0.25)" --rounds 21

The model is SmolLM2 (135M parameters, 30 layers, 9 query and 3 KV heads of 64) in float32, on one thread. Times are processor
time (`time.thread_time`): caches take turns in every round, each advances by one token per round, and the best of the rounds
counts, because other work on the machine only adds. The file is written after every setting.

Nothing is prefilled 30 times over: a prompt of random tokens runs through the first layer only, with the method itself, and its
state is copied to all layers: the size of a cache decides how long a step takes, its content does not. Tables of coded methods
are random numbers of the right shape for the same reason. The floor is the time of reading weights and cache once, at the rate
of `torch.sum` over a large tensor in the same rounds; tables of coded methods are not counted. With 8 sequences of 8,192 tokens
the caches of one method take 3 GB, so give ``--together 2``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from pondera.cache.state import names_of
from pondera.core import spec
from pondera.core.run_folder import write_atomic
from pondera.inference.load import load
from pondera.kernels.linear import use_kernels
from pondera.kernels.products import why_not_used
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod

METHODS = (
    "PreallocatedCache()",
    "PreallocatedCache(exact=False)",
    "KIVI(4)",
    "VQKV()",
    "FisherVQ()",
    "H2O(0.25)",
    "SnapKV(0.25)",
    "KVzip(0.25)",
    "StreamingLLM(0.25)",
    "TokenSelect()",
    "Coded(KVzip(0.5), KIVI(4))",
)
STOCK = ("DynamicCache", "StaticCache")
CONTEXTS, BATCHES = (512, 2048, 4096, 8192), (1, 8)
READ = 2**28
"""Bytes of the tensor whose reading is timed."""


def tables(method: KVCacheMethod, config: Any) -> KVCacheMethod:
    """Gives a method that needs `fit` random tables, which cost as much as fitted ones."""
    if method.fitted:
        return method
    method.bind(config)
    draw = torch.Generator().manual_seed(0)
    for name, buffer in method.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.randn(buffer.shape, generator=draw))
        elif name == "key_bytes":  # of FisherVQ: groups of whole rotation pairs
            keys, _ = method.layout(config)  # type: ignore[operator]
            L, G, D = buffer.shape
            number_D = torch.arange(D) % (D // 2) % keys
            buffer.copy_((torch.arange(G)[:, None] * keys + number_D).expand(L, G, D))
    method.get_buffer("is_fitted").fill_(True)
    return method


def first_layer(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of the first layer of another, with the same weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    config.max_position_embeddings *= 2  # KVzip reads parts of the prompt again after it
    with torch.device("meta"):
        small = LlamaForCausalLM(config).eval()
    small.model.embed_tokens, small.model.rotary_emb = model.model.embed_tokens, model.model.rotary_emb
    small.model.layers[0], small.model.norm = copy.deepcopy(model.model.layers[0]), model.model.norm
    small.lm_head = model.lm_head
    return small


def filled(name: str, model: LlamaForCausalLM, ids_1T: Tensor, batch: int, room: int) -> Any:
    """A cache that has seen these tokens in every batch row."""
    config, tokens = model.config, ids_1T.shape[1]
    if name in STOCK:
        cache = DynamicCache(config=config) if name == STOCK[0] else StaticCache(config=config, max_cache_len=room)
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        return cache
    small = first_layer(model)
    begun = tables(spec.build(name, "kv_cache"), small.config).cache(small)
    small(ids_1T, past_key_values=begun, logits_to_keep=1)
    begun.batch_repeat_interleave(batch)
    cache = tables(spec.build(name, "kv_cache"), config).cache(model)
    for layer in cache.kept:
        for part in names_of(type(layer)):
            setattr(layer, part, copy.deepcopy(getattr(begun.kept[0], part)))
        layer.derive()
    return cache


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes of the cache that a step reads, at most: those of its tensors; of a `StaticCache` those of the tokens seen."""
    if isinstance(cache, KVCache):
        return sum(layer.nbytes() for layer in cache.kept)
    kept = [rows[:, :, :tokens] for layer in cache.layers for rows in (layer.keys, layer.values)]
    return sum(rows.numel() * rows.element_size() for rows in kept)


def measured(names: list[str], model: LlamaForCausalLM, context: int, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, ratios and floors, by cache."""
    ids_1T = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(context))
    caches = {name: filled(name, model, ids_1T, batch, context + rounds + 1) for name in names}
    token_B1 = ids_1T[:, :1].expand(batch, 1).contiguous()
    memory = torch.ones(READ // 4)
    steps: dict[str, Callable[[], Any]] = {
        name: lambda cache=cache: model(token_B1, past_key_values=cache) for name, cache in caches.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, "read")}
    for number in range(rounds + 1):
        for name, step in {**steps, "read": memory.sum}.items():
            start = time.thread_time()
            step()
            if number:  # the first round warms up
                seconds[name].append(time.thread_time() - start)
    rate = READ / min(seconds.pop("read"))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    best = {name: min(times) for name, times in seconds.items()}
    return {
        "bytes_per_second": rate,
        "caches": {
            name: {
                "seconds": one,
                "over_dynamic": one / best[STOCK[0]],
                "over_faster": one / min(best[name] for name in STOCK),
                "cache_bytes": (held := cache_bytes(caches[name], context)),
                "floor_seconds": (weights + held) / rate,
            }
            for name, one in best.items()
        },
    }


def summary(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """What the file has: the results, and how they were measured."""
    words = f"--together {args.together} --rounds {args.rounds} --batches {' '.join(map(str, args.batches))}"
    return {
        "command": f"python -m benchmarks.decode_step {words} --contexts {' '.join(map(str, args.contexts))}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[1],
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="spec strings of KV cache methods")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--together", type=int, default=len(METHODS), help="methods in memory at once, with the stock caches"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if reason := why_not_used():
        raise SystemExit(f"no native products here: {reason}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = load("smollm2").model.backbone.lm
    use_kernels(model, "native")
    results: dict[str, Any] = {}
    with torch.no_grad():
        for batch in args.batches:
            for context in args.contexts:
                found: dict[str, Any] = {}
                for start in range(0, len(args.methods), args.together):
                    names = [*STOCK, *args.methods[start : start + args.together]]
                    part = measured(names, model, context, batch, args.rounds)
                    found = {**part, "caches": {**part["caches"], **found.get("caches", {}), **part["caches"]}}
                results[f"{context} x {batch}"] = found
                print(f"{context} tokens x {batch}, {found['bytes_per_second'] / 1e9:.1f} GB/s")
                for name, row in found["caches"].items():
                    print(
                        f"  {name:32} {1000 * row['seconds']:7.1f} ms  {row['over_dynamic']:5.2f} x dynamic  "
                        f"{row['over_faster']:5.2f} x faster  floor {1000 * row['floor_seconds']:6.1f} ms",
                        flush=True,
                    )
                if args.out:
                    write_atomic(args.out, json.dumps(summary(args, results), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The model and the caches of the long-context benchmark, and functions that fill caches without a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS, WIDTH, VOCABULARY = 8, 8, 2, 128, 8192
STOCK = ("DynamicCache", "StaticCache", "QuantizedCache")
"""The caches of transformers. `PRESS` is from kvpress; every other side is a KV cache method of Pondera."""
PRESS = "StreamingLLMPress(0.75)"
SPARE = 64
"""Additional tokens in a cache of fixed size, beyond the context."""


def build_model(dtype: torch.dtype = torch.float32, trained: str | None = None) -> LlamaForCausalLM:
    if trained:
        from pondera.inference.load import load

        lm = load(trained).model.backbone.lm.eval().to(dtype)
        assert isinstance(lm, LlamaForCausalLM), (
            "only Llama is supported: the byte counts and the cache filling assume it"
        )
        return lm
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=2**20,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def stock_cache(side: str, config: LlamaConfig, tokens: int) -> Any:
    """A cache of transformers for `tokens` tokens."""
    from transformers import QuantizedCache, StaticCache

    if side == "StaticCache":
        return StaticCache(config=config, max_cache_len=tokens + SPARE)
    if side == "QuantizedCache":
        return QuantizedCache("quanto", config, nbits=4)
    return DynamicCache(config=config)


def new_cache(side: str, model: LlamaForCausalLM, tokens: int) -> Any:
    """An empty cache; also sets the attention implementation that it needs on the model."""
    if side in (*STOCK, PRESS):
        model.set_attn_implementation("sdpa")
        return stock_cache(side, model.config, tokens)
    from pondera.core import spec

    memory: Any = spec.build(side, "kv_cache")
    if not memory.fitted:  # the contents of the codebooks do not affect the speed
        memory.bind(model.config)
        for table in memory.buffers():
            if table.is_floating_point():
                table.normal_(std=0.1)
        memory.is_fitted.fill_(True)
    return memory.cache(model)


def fill(side: str, cache: Any, config: LlamaConfig, tokens: int, batch: int) -> None:
    """Fills a cache with random keys and values, and evicts what the method would have evicted."""
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for number in range(config.num_hidden_layers):
        generator = torch.Generator().manual_seed(number)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        if side in (*STOCK, PRESS):
            cache.update(keys, values, number)
        else:
            remember(cache.layers[number], keys, values)


def remember(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Puts keys and values into an empty cache layer of Pondera."""
    layer.update(keys, values)
    (fill_slots if hasattr(layer, "tables") else fill_regions)(layer, keys, values)


def fill_slots(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Does what `KVStoreLayer.attend` does, without the attention."""
    from pondera.cache.kv_store import KVStore

    table = KVStore.like(keys, values, layer.method.note_defaults)
    table.append(keys, values, torch.arange(keys.shape[2]).expand(len(keys), -1))
    for name in table.notes:
        table.note[name].uniform_(generator=torch.Generator().manual_seed(0))
    layer.tables, layer.state = [table], {"padding": torch.zeros(len(keys), dtype=torch.int64)}
    layer.method.evict_layer(layer)


def fill_regions(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Fills both ends with exact rows and the middle with random codes, because real encoding would take minutes."""
    from pondera.cache.ring_buffer import RingBuffer

    batch, sinks, tokens = len(keys), layer.method.sinks, keys.shape[2]
    layer.pads, layer.begins, layer.coded = [0] * batch, [0] * batch, [0] * batch
    layer.sink_keys, layer.sink_values = (rows[:, :, :sinks].clone() for rows in (keys, values))
    layer.ring = RingBuffer(keys[:, :, sinks:], values[:, :, sinks:], sinks, tokens, sinks, True)
    exact = layer.method.window
    code(layer, max(0, tokens - sinks - exact) // layer.method.flush_size * layer.method.flush_size)
    layer.ring.drop(layer._exact_from())
    layer.ring.resize(layer._room)


def code(layer: Any, tokens: int) -> None:
    """Appends random codes for `tokens` tokens."""
    batch, coded = layer.batch(), layer.coded[0]
    for coder, codes in zip(layer.coders, layer.codes, strict=True):
        like = coder.encode(layer.sink_keys[:, :, :1], None)
        new = {
            name: torch.randint(coder.codes, (*part.shape[:2], tokens, *part.shape[3:])).to(part.dtype)
            for name, part in like.items()
        }
        codes.write(coder, new, slice(None), coded, tokens, batch)
    layer.coded = [coded + tokens] * batch


def held_bytes(cache: Any) -> int:
    """Bytes of the keys, values, codes and codebooks in use: what a decoding step must read."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "coders"):
            parts = [layer.sink_keys, layer.sink_values, *layer.ring.read(layer.ring.first, layer.ring.end)]
            parts += [table for coder in layer.coders for table in coder.tables]
            total += layer.code_bytes()
        elif hasattr(layer, "tables"):
            parts = [rows for table in layer.tables for rows in (table.keys, table.values)]
        else:
            names = ("keys", "values", "_quantized_keys", "_quantized_values")
            parts = [part for part in (getattr(layer, name, None) for name in names) if part is not None]
        for part in parts:
            inner = [getattr(part, name) for name in ("_data", "_scale", "_shift") if hasattr(part, name)] or [part]
            total += sum(x.nbytes if type(x) is torch.Tensor else x._data.nbytes for x in inner)
    return total


def grow(side: str, cache: Any, tokens: int, dtype: torch.dtype) -> None:
    """Appends random keys and values."""
    keys, values = (torch.randn(1, KV_HEADS, tokens, WIDTH).to(dtype) for _ in range(2))
    for number, layer in enumerate(cache.layers):
        if side in STOCK:
            cache.update(keys, values, number)
        elif not layer.batch():
            remember(layer, keys, values)
        elif hasattr(layer, "coders"):
            code(layer, tokens)
            layer.seen += tokens
            for name in ("first", "end", "origin"):
                setattr(layer.ring, name, getattr(layer.ring, name) + tokens)
        else:
            start = layer.seen
            layer.update(keys, values)
            layer.tables[0].append(keys, values, torch.arange(start, start + tokens)[None])
            layer.method.evict_layer(layer)

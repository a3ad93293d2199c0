"""Helpers of tests of KV-cache policies: a small model, its attention weights, and a reference implementation of top-k."""

from __future__ import annotations

from typing import Any

import torch
from helpers.architectures import BACKBONES
from transformers import AutoConfig, AutoModelForCausalLM

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.policy import ALL, Policy

_MODELS: dict[tuple[int, str, float], Any] = {}


def model(layers: int = 2, family: str = "llama", larger: float = 2) -> Any:
    """A model, by default with two KV heads for four query heads, and weights so large that attention is not uniform.

    If its family has sliding windows, the second layer has one.
    """
    if (layers, family, larger) not in _MODELS:
        config = {**BACKBONES[family], "num_hidden_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = ["sliding_attention" if n == 1 else "full_attention" for n in range(layers)]
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
        for parameter in made.parameters():
            parameter.requires_grad_(False).mul_(larger)
        _MODELS[layers, family, larger] = made
    return _MODELS[layers, family, larger]


class Watch(Policy):
    """A policy that evicts nothing and stores its first observation of each layer."""

    paper = cost = "a test's"
    observation_window = ALL

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, AttentionObservation] = {}

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        self.seen.setdefault(layer.index, seen)


def weights(x_BT: torch.Tensor, layers: int = 2) -> list[list[list[list[list[float]]]]]:
    """Attention weights of one sequence in one call, by layer, KV head, query head of the group, query and key."""
    watch, lm = Watch(), model(layers)
    lm(x_BT, past_key_values=watch.cache(lm))
    return [watch.seen[layer].weight_BGRTS[0].tolist() for layer in range(layers)]


def run(memory: KVCacheMethod, x_BT: torch.Tensor, pieces: list[int], layers: int = 2) -> KVCache:
    """Runs the first tokens of a sequence with a cache, in pieces of these sizes; returns the cache."""
    lm = model(layers)
    cache = memory.cache(lm)
    for piece in x_BT[:, : sum(pieces)].split(pieces, dim=1):
        lm(piece, past_key_values=cache)
    return cache


def kept(cache: KVCache) -> list[list[list[int]]]:
    """The kept tokens of the first batch row, by layer and head."""
    found = []
    for layer in cache.kept:
        assert isinstance(layer, KVStoreLayer)
        heads = [head for table in layer.tables for head in table.position[0]]
        found.append([sorted(head[head >= 0].tolist()) for head in heads])
    return found


def best(score: list[float], count: int, always: set[int]) -> list[int]:
    """Reference implementation of top-k: the tokens in `always` and those with the highest scores; newer ones first in ties."""
    others = sorted((t for t in range(len(score)) if t not in always), key=lambda t: (score[t], t), reverse=True)
    return sorted(always | set(others[: count - len(always)]))

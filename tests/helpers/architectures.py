"""Tiny configs of all tested architectures: 3 to 6 layers, width 64, vocabulary 97."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 97
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
WINDOW = 6
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, **SIZES},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **SIZES},
    "qwen3_mixed": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        **SIZES,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": WINDOW, **SIZES, "num_hidden_layers": 6},
    "gpt_neox": {"model_type": "gpt_neox", **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": VOCAB,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "head_dim": 16,
        "num_experts": 0,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        **SIZES,
        "num_hidden_layers": 4,
    },
}
LINEAR = {"qwen3_next"}


def ids(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Random token ids ``[batch, tokens]``, determined by the seed."""
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads sequences of different lengths on the left; returns tokens and mask, ``[batch, tokens]`` each."""
    width = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    return tokens, torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()

"""A tiny random model of any causal architecture that the installed transformers knows.

What is set are the sizes that a configuration has under one of the usual names; everything else keeps its default.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, HEADS, MOST = 97, 64, 4, 20_000_000
"""Tokens, width and heads of a tiny model, and the most parameters that one may have."""
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "d_embed"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads",
                     "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "d_ff",
                     "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
                     "dense_intermediate_size", "intermediate_size_mlp"), WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "d_head", "kv_channels", "attention_head_dim", "v_head_dim", "qk_nope_head_dim",
                     "global_head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                     "hidden_size_per_layer_input", "index_head_dim", "lru_width", "dim_head"), 16),
    "qk_rope_head_dim": 8, "rotary_dim": 8, "num_key_value_heads": 2, "num_query_groups": 2, "num_kv_heads": 2,
    "num_global_key_value_heads": 2, "swa_num_key_value_heads": 2,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "num_selected_experts",
                     "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_groups"), 1),
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_layer_start_index": 1,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "initializer_range": 0.1,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "ssm_state_size": 16, "index_n_heads": 2,
    "n_mel_channels": 8, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": None, "num_hash": 1,
    "num_kv_shared_layers": 0, "is_decoder": True, "state_size": 16, "chunk_size": 16, "mamba_chunk_size": 16,
    "gate_low_rank_dim": 8,
}  # fmt: skip
BY_KIND: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}
"""What some architectures need beside sizes."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_encoder_layers",
          "num_decoder_layers")  # fmt: skip
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


class NotBuilt(Exception):
    """No tiny model of this architecture can be made by shrinking the usual sizes."""


def families() -> list[str]:
    """The types of all configurations that have a causal LM, each class once."""
    found: dict[Any, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind in CONFIG_MAPPING_NAMES:
            found.setdefault((name, CONFIG_MAPPING_NAMES[kind]), kind)
    return sorted(found.values())


def tiny_config(kind: str) -> PreTrainedConfig:
    """The configuration of a tiny model.

    Raises:
        NotBuilt: it cannot be had.
    """
    made = CONFIG_MAPPING[kind]
    try:
        return made(**(_shrunk(made(), made) | BY_KIND.get(kind, {})))
    except Exception as error:
        raise NotBuilt(f"no small configuration ({_short(error)})") from error


def _shrunk(default: PreTrainedConfig, made: Any) -> dict[str, Any]:
    known = {**default.to_dict(), **{name: None for name in getattr(default, "attribute_map", {})}}
    given = {name: size for name, size in SIZES.items() if name in known}
    if "head_dim" in given and known["head_dim"] is None and "qk_rope_head_dim" not in known:
        given["head_dim"] = WIDTH // HEADS
    if "head_dim" in given and "qk_rope_head_dim" in known:
        given["head_dim"] = SIZES["qk_rope_head_dim"]
    if "num_key_value_heads" in given and known["num_key_value_heads"] == known.get("num_attention_heads"):
        given["num_key_value_heads"] = HEADS
    for name in ("q_lora_rank", "num_global_key_value_heads"):
        if name in given and known[name] is None:
            del given[name]
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        kinds = list(dict.fromkeys(known.get(name) or ()))
        if len(kinds) > 1:
            given[name] = kinds
    depth = max([2, *(len(value) for name, value in given.items() if name in ("layer_types", "layers_block_type"))])
    if len(given.get("layer_types", ())) == 0 and known.get("layer_types"):
        given["layer_types"] = list(known["layer_types"])[:1] * depth
    given |= {name: depth for name in DEPTHS if name in known}
    given |= {name: 0 if name == "pad_token_id" else 1 for name in IDS if isinstance(known.get(name), (int, list))}
    for name in getattr(made, "sub_configs", {}):
        if isinstance(known.get(name), dict) and "text" in name:
            given[name] = _shrunk(getattr(default, name), type(getattr(default, name)))
    return given


def tiny_model(kind: str) -> PreTrainedModel:
    """A tiny random causal LM, always the same.

    Raises:
        NotBuilt: it cannot be had.
    """
    config = tiny_config(kind)
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        raise NotBuilt(f"no model of the small configuration ({_short(error)})") from error
    if parameters > MOST:
        raise NotBuilt(f"{parameters / 1e6:.0f} M parameters with the usual sizes made small")
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval().float()
        with torch.no_grad():
            model(torch.arange(3, 9)[None])
    except Exception as error:
        raise NotBuilt(f"the small model does not run ({_short(error)})") from error
    return model


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"

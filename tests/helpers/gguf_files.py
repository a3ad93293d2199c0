"""Writes tiny Llama checkpoints as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from helpers import saved_models
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama() -> LlamaForCausalLM:
    """A Llama with grouped KV heads and the vocabulary of the tests' tokenizer, seeded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(saved_models.tokenizer()), **sizes, **heads)).eval()


def write(file: Path, model: LlamaForCausalLM, leave_out: str = "") -> Path:
    """Writes a model and the tests' tokenizer.

    Args:
        file: where to.
        model: the model.
        leave_out: the GGUF name of a tensor that is missing.
    """
    config, out = model.config, gguf.GGUFWriter(file, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    _tokenizer(out)
    for name, tensor in _tensors(model).items():
        if name != leave_out:
            out.add_tensor(name, tensor.detach().float().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def _tokenizer(out: gguf.GGUFWriter) -> None:
    tokenizer = saved_models.tokenizer()
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_merges([" ".join(pair) for pair in made["merges"]])
    out.add_eos_token_id(tokenizer.eos_token_id)


def _tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Tensors by GGUF name; the rows of queries and keys are in the order of llama.cpp's rotation."""
    config = model.config
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for name, weight in layer.state_dict().items():
            short = name.removesuffix(".weight")
            if short.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if short.endswith("q_proj") else config.num_key_value_heads
                weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            found[f"blk.{index}.{NAMES[short]}.weight"] = weight
    return found

"""Loads stories260K, a Llama of 260,032 parameters trained on TinyStories, from the llama2.c format into transformers.

Source: karpathy/tinyllamas on the Hugging Face hub (MIT). The folder contains ``stories260K.bin`` and ``tok512.bin``.

Shapes: V vocabulary, D width, L layers, F inner width.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

START = 1
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
    "red ball."
)
"""Its greedy output after the start token."""


def stories260k(folder: Path) -> tuple[LlamaForCausalLM, list[bytes]]:
    """The model, and the bytes of each of its 512 tokens.

    Raises:
        ValueError: the size of the file is wrong.
    """
    data = (folder / "stories260K.bin").read_bytes()
    D, F, L, heads, kv_heads, V, context = struct.unpack("<7i", data[:28])
    numbers = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
    width = D // heads
    shapes = {
        "embed": (V, D),
        "input_layernorm": (L, D),
        "q_proj": (L, D, D),
        "k_proj": (L, kv_heads * width, D),
        "v_proj": (L, kv_heads * width, D),
        "o_proj": (L, D, D),
        "post_attention_layernorm": (L, D),
        "gate_proj": (L, F, D),
        "down_proj": (L, D, F),
        "up_proj": (L, F, D),
        "norm": (D,),
    }
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        found[name], numbers = numbers[:count].view(shape), numbers[count:]
    if len(numbers) != context * width:  # two rotary tables, which are not needed
        raise ValueError(f"{folder}: {len(numbers)} numbers remain, but two rotary tables have {context * width}")
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=V,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=START,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": found["embed"],
        "lm_head.weight": found["embed"],
        "model.norm.weight": found["norm"],
    }
    for layer in range(L):
        for name in shapes:
            if name in ("embed", "norm"):
                continue
            weight = found[name][layer]
            if name in ("q_proj", "k_proj"):  # interleaved rotary pairs become half-split
                weight = weight.view(-1, width // 2, 2, D).transpose(1, 2).reshape(weight.shape)
            place = "self_attn." if name[0] in "qkvo" and name[1] == "_" else "" if "norm" in name else "mlp."
            state[f"model.layers.{layer}.{place}{name}.weight"] = weight
    model.load_state_dict(state)
    return model, _pieces((folder / "tok512.bin").read_bytes(), V)


def _pieces(data: bytes, count: int) -> list[bytes]:
    pieces, at = [], 4
    for _ in range(count):
        (length,) = struct.unpack("<i", data[at + 4 : at + 8])
        piece = data[at + 8 : at + 8 + length]
        # Single bytes that are not letters are written as <0x0A>.
        pieces.append(bytes([int(piece[3:5], 16)]) if len(piece) == 6 and piece.startswith(b"<0x") else piece)
        at += 8 + length
    return pieces


def check(model: LlamaForCausalLM, pieces: list[bytes]) -> None:
    """Raises a ValueError if the greedy output is not `GREEDY`."""
    ids = model.generate(torch.tensor([[START]]), max_new_tokens=48, do_sample=False, pad_token_id=0)[0, 1:]
    output = b"".join(pieces[int(token)] for token in ids).decode(errors="replace").strip()
    if not output.startswith(GREEDY):
        raise ValueError(f"stories260K generates {output!r}, expected {GREEDY!r}")

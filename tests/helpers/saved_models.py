"""Writes model folders for tests: untrained models with one tiny tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINKS = {
    "plain": None,
    "ponderlm2": "PonderLM2(thoughts=1)",
    "exact": "PonderLM2(thoughts=1, eval_rounds='exact')",
    "cot": "AdaptiveLatentCoT(steps=1, halting='fixed')",
}
SEGMENTS = {"concept": "ConceptLM(chunk=2, codes=4, segments=2)"}
POSITIONS = 96


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with 280 tokens, including all bytes; an emoji takes several tokens."""
    from pondera.data.tokenizer import train_tokenizer

    return train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 8], 280)


def save(folder: Path, name: str = "plain") -> Path:
    """Writes the model of this name and the tokenizer into a folder; returns the folder."""
    import torch

    from pondera.models.adaptive_lm import AdaptiveLM
    from pondera.models.config import AdaptiveConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 280, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    chosen = {"chunk": SEGMENTS[name]} if name in SEGMENTS else {"think": THINKS[name]}
    config = AdaptiveConfig(backbone={"model_type": "llama", **sizes, **words}, **chosen)
    model = AdaptiveLM(config)
    if name in SEGMENTS:  # the first training batch initializes the codebooks
        ids = torch.randint(280, (4, 64), generator=torch.Generator().manual_seed(0))
        model.train()(ids, labels=ids)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def checkpoint(folder: Path, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None) -> Path:
    """Writes a transformers model without Pondera, with additional fields in its two config files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 280, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**sizes, **words, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder

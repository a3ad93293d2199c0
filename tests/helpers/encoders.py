"""Writes a tiny untrained sentence encoder for tests."""

from __future__ import annotations

from pathlib import Path

from helpers import saved_models


def save(folder: Path, hidden_size: int = 16) -> Path:
    """Writes a BERT of random weights and a tokenizer with a padding token into a folder; returns the folder."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = PreTrainedTokenizerFast(tokenizer_object=saved_models.tokenizer().backend_tokenizer, pad_token="<pad>")
    sizes = {"hidden_size": hidden_size, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder

"""One tiny tokenizer and untrained models with it, saved once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語, 🙂! " * 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}
THINKS = {
    "plain": None,
    "ponderlm2": "PonderLM2(thoughts=1)",
    "exact": "PonderLM2(thoughts=1, eval_rounds='exact')",
    "cot": "AdaptiveLatentCoT(steps=1)",
}


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE: every text has tokens, and those of 🙂 are bytes."""
    from pondera.ground.tokens import train_tokenizer

    return train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 8], 280)


@pytest.fixture(scope="session")
def save_model(tokenizer) -> Callable[[Path, str], Path]:
    """Saves the untrained model of that name, with the tokenizer, into a folder."""
    import torch

    from pondera.model.config import AdaptiveConfig
    from pondera.model.lm import AdaptiveLM

    def save(folder: Path, name: str = "plain") -> Path:
        torch.manual_seed(0)
        backbone = {"model_type": "llama", "vocab_size": len(tokenizer), "initializer_range": 0.3, **SIZES}
        AdaptiveLM(AdaptiveConfig(backbone=backbone, think=THINKS[name])).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def models(save_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each name; not to be changed."""
    return {name: save_model(tmp_path_factory.mktemp("models") / name, name) for name in THINKS}

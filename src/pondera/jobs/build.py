"""From a RunConfig to a model that can be trained on its text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pondera.ground.errors import UserError
from pondera.ground.settings import DataConfig, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pondera.model.config import AdaptiveConfig
    from pondera.model.lm import AdaptiveLM


def resolve(config: RunConfig) -> RunConfig:
    """`config` with what follows from it written out: a wrapped checkpoint is read with its own tokenizer.

    A tokenizer that was chosen, that is any but the default, stays.
    """
    path = config.backbone
    if not isinstance(path, str) or config.data.tokenizer != DataConfig.tokenizer:
        return config
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def new_model(config: RunConfig, vocab_size: int) -> AdaptiveLM:
    """The model of a run before its first step, in float32, with weights from ``train.seed`` or the checkpoint.

    Args:
        config: what it is made of.
        vocab_size: of the tokenizer; a backbone given as a mapping takes it over.

    Raises:
        UserError: no backbone, a vocabulary that is not the tokenizer's, or a context that does not fit.

    Example:
        >>> from pondera.ground.settings import from_dict
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = new_model(from_dict({"backbone": {"model_type": "llama", **sizes}}), vocab_size=97)
        >>> model.backbone.config.vocab_size
        97
    """
    import torch

    from pondera.model.lm import AdaptiveLM

    torch.manual_seed(config.train.seed)
    return AdaptiveLM(adaptive_config(config, vocab_size)).float()


def adopt(model: AdaptiveLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tells a new model the ids of its tokenizer's special tokens, so that `generate` knows where a text ends."""
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for place in (model.backbone.config, model.backbone.lm.generation_config, model.generation_config):
        place.bos_token_id, place.eos_token_id, place.pad_token_id = tokenizer.bos_token_id, end, pad


def adaptive_config(config: RunConfig, vocab_size: int) -> AdaptiveConfig:
    from pondera.model.config import AdaptiveConfig

    given = config.backbone
    if not isinstance(given, (dict, str)) or not given:
        raise UserError(
            f"backbone: {given!r}; give a mapping such as {{model_type: llama, hidden_size: 128, num_hidden_layers: 3}}, "
            "or a checkpoint folder"
        )
    tree = {"vocab_size": vocab_size, **given} if isinstance(given, dict) else given
    parts: dict[str, Any] = {"think": config.think, "memory": config.memory, "segment": config.segment}
    adaptive = AdaptiveConfig(backbone=tree, init=config.init, **parts)
    inner = adaptive.get_text_config()
    _check_vocabulary(config, inner.vocab_size, vocab_size)
    if config.data.isolate and "linear_attention" in (getattr(inner, "layer_types", None) or ()):
        raise UserError(
            f"data.isolate: {inner.model_type} has linear-attention layers, whose state runs on from one document into "
            "the next; use data.isolate: false"
        )
    context, limit = config.data.context, getattr(inner, "max_position_embeddings", None)
    if limit is not None and limit < context:
        names = {"max_position_embeddings", inner.attribute_map.get("max_position_embeddings")}
        if isinstance(given, str) or names & given.keys():
            raise UserError(
                f"data.context: {context} tokens do not fit the {limit} positions of the backbone; use --data.context "
                f"{limit}" + ("" if isinstance(given, str) else f" or --backbone.max_position_embeddings {context}")
            )
        inner.max_position_embeddings = context
    return adaptive


def _check_vocabulary(config: RunConfig, model_size: int, tokenizer_size: int) -> None:
    """Equal, but for a checkpoint, whose vocabulary is often padded beyond its tokenizer's."""
    from pondera.ground.tokens import bpe_size

    own = isinstance(config.backbone, str)
    padded = own and not bpe_size(config.data.tokenizer) and tokenizer_size < model_size
    if tokenizer_size == model_size or padded:
        return
    advice = (
        f"use the checkpoint's own tokenizer: --data.tokenizer {config.backbone}"
        if own
        else f"leave backbone.vocab_size out, or set it to {tokenizer_size}"
    )
    raise UserError(
        f"backbone.vocab_size: the backbone has {model_size} tokens and the tokenizer {config.data.tokenizer!r} has "
        f"{tokenizer_size}; {advice}"
    )

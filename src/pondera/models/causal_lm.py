"""The transformers model that a config names: from an earlier model, from a checkpoint, or with new weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from torch import nn

from pondera.core import spec
from pondera.core.errors import UserError
from pondera.core.hf import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from pondera.models.backbone import scaled_init
from pondera.models.config import AdaptiveConfig

if TYPE_CHECKING:
    from pondera.methods.head.base import Head
    from pondera.methods.think.base import Think
    from pondera.models.adaptive_lm import AdaptiveLM

log = logging.getLogger(__name__)


def causal_lm(config: AdaptiveConfig, think: Think | None, old: AdaptiveLM | None) -> PreTrainedModel:
    """The transformers model of the backbone: from an old model, from a checkpoint, or newly initialised."""
    backbone = cast(PreTrainedConfig, config.backbone)
    window = getattr(backbone, "sliding_window", None)
    if think is not None and think.interleaved and window:
        backbone = type(backbone).from_dict(backbone.to_dict())
        backbone.sliding_window = window * think.slots_per_token
        backbone._attn_implementation = cast(PreTrainedConfig, config.backbone)._attn_implementation
    if old is not None:  # its weights, in a model with the window size of the new method
        lm = old.backbone.lm
        known = {
            name: tensor for name, tensor in lm.state_dict().items() if not old.config.head or ".table" not in name
        }
        return type(lm).from_pretrained(None, config=backbone, state_dict=known, dtype=config.dtype or lm.dtype)
    if config._checkpoint is not None:
        return saved_model(config._checkpoint, config=backbone)
    try:
        lm = AutoModelForCausalLM.from_config(backbone)
    except Exception as error:  # an architecture can raise anything
        raise UserError(
            f"backbone: a {backbone.model_type} with these settings cannot be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}); check its sizes, names of activations and rates"
        ) from error
    if config.init == "scaled":
        scaled_init(lm)
    return lm


def put_head(lm: PreTrainedModel, config: AdaptiveConfig, old: AdaptiveLM | None) -> None:
    """Replaces the output matrix of a causal LM by the configured head; the head of an old model is kept."""
    if old is not None and old.config.head:
        config.head = config.head or old.config.head
        if config.head != old.config.head:
            raise UserError(
                f"head: {config.head}: the backbone checkpoint has the head {old.config.head} and no output matrix to build "
                "another head from; leave head out"
            )
        lm.set_output_embeddings(old.backbone.lm.get_output_embeddings())
        return
    if not config.head:
        return
    if getattr(lm.config, "tie_word_embeddings", False):
        raise UserError(
            f"head: {config.head} replaces the output matrix, which is tied to the embeddings; use "
            "tie_word_embeddings: false in the backbone"
        )
    matrix, head = cast(nn.Linear, lm.get_output_embeddings()), cast("Head", spec.build(config.head, "head"))
    trained = config._checkpoint is not None or matrix.weight.is_meta  # on meta, weights are loaded later, or never
    head.bind(matrix.out_features, matrix.in_features, matrix.weight if trained else None)
    for parameter in head.parameters():
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (else `post_init` would initialise it)
    lm.set_output_embeddings(head)


def saved_model(path: str, **options: Any) -> Any:
    """Loads the causal LM of a checkpoint; missing weights raise."""
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its weights cannot be loaded: {str(error).splitlines()[0]}") from error
    lm, info = loading
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{path}: weights are missing: {', '.join(missing[:3])}{more}; give a folder whose files "
            "belong to one checkpoint"
        )
    if unused := sorted(info["unexpected_keys"]):
        log.info("%s: unexpected weights ignored: %s", path, ", ".join(unused))
    return lm

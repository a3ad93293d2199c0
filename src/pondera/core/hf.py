"""Every name that Pondera takes from transformers and that may move between its versions.

Nothing else in the package imports transformers' internals, but `hf_config.py`, which is light. What differs between
versions is decided here, by what the installed one offers: no other file asks for a version. `versions.py` knows those
that the contract suite passed on (``tools/versions.py`` runs it, ``docs/versions.md`` has the results).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE",
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoModelForCausalLM",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "GenerationConfig",
    "GenerationMixin",
    "ModelOutput",
    "PreTrainedConfig",
    "PreTrainedModel",
    "checkpoint_activations",
    "checkpointing_arguments",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "is_checkpointing",
    "register",
    "sdpa_attention",
    "sdpa_mask",
]

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the KV cache: a keyword of models, decoder layers and mask makers, a field of outputs and a
name among what `generate` hands around. ``past_key_values`` until 5.23, ``cache`` since 5.24."""

_CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def checkpointing_arguments(wanted: bool) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that switch activation checkpointing on or off.

    They are called ``activation_checkpointing`` since 5.23 and ``gradient_checkpointing`` before.
    """
    name = f"{_CHECKPOINTING}_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False} if wanted else None}


def checkpoint_activations(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Switches activation checkpointing of a model on, whatever the installed version calls it."""
    getattr(model, f"{_CHECKPOINTING}_checkpointing_enable")({"use_reentrant": use_reentrant})


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activation checkpointing of a model is on."""
    return bool(getattr(model, f"is_{_CHECKPOINTING}_checkpointing"))


def register(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Lets transformers find a causal LM in the three ways in which it looks for one.

    By its config (`AutoModelForCausalLM`), by the class name that ``config.json`` has under ``architectures``
    (``transformers serve`` asks the package itself), and among the names of causal LMs (label smoothing shifts the labels
    of these alone). It may be called again.
    """
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # transformers executes its own __init__ a second time (processing_utils.py), and modules hold the one or the other.
    parts = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    for module in [sys.modules["transformers"], *(vars(part).get("transformers") for part in parts)]:
        if getattr(module, "__name__", None) == "transformers":
            setattr(module, model_class.__name__, model_class)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__

"""All names imported from transformers that may change between its versions.

Only this file and `hf_config.py`, which imports no models, import internals of transformers. Differences between versions are
resolved here, by the features of the installed version; no other file depends on the version. `versions.py` lists the
versions that pass the contract suite (``tools/versions.py`` runs it, ``docs/versions.md`` has the results).
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
"""Name of the KV cache in transformers: a keyword of models, decoder layers and mask functions, a field of outputs and a key
of the model keywords in `generate`. ``past_key_values`` until 5.23, ``cache`` since 5.24."""

_CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def checkpointing_arguments(wanted: bool) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that switch activation checkpointing on or off.

    They are called ``activation_checkpointing`` since 5.23 and ``gradient_checkpointing`` before.
    """
    name = f"{_CHECKPOINTING}_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False} if wanted else None}


def checkpoint_activations(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Enables activation checkpointing of a model, under the name that the installed version uses."""
    getattr(model, f"{_CHECKPOINTING}_checkpointing_enable")({"use_reentrant": use_reentrant})


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activation checkpointing of a model is enabled."""
    return bool(getattr(model, f"is_{_CHECKPOINTING}_checkpointing"))


def register(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Registers a causal LM with transformers.

    transformers looks for a model in three places: by its config class (`AutoModelForCausalLM`), by the class name under
    ``architectures`` in ``config.json`` (``transformers serve`` reads it from the package), and in the list of causal LMs
    (label smoothing shifts labels for these only). Calling this again is harmless.
    """
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # transformers executes its __init__ twice (processing_utils.py), and its modules refer to either copy.
    parts = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    for module in [sys.modules["transformers"], *(vars(part).get("transformers") for part in parts)]:
        if getattr(module, "__name__", None) == "transformers":
            setattr(module, model_class.__name__, model_class)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__

"""Every name that Pondera takes from transformers and that may move between its versions.

Nothing else in the package imports transformers' internals, but `hf_config.py`, which is light. When a new minor series
arrives, these two and `backbone.py` are what has to be read again. Known to work: transformers 5.23.
"""

from __future__ import annotations

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
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
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
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "sdpa_attention",
    "sdpa_mask",
]

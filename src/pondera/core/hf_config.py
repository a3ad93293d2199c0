"""Names from transformers that configs need; importing them does not import any model.

Separate from `hf.py`, which imports generation and attention code, so that reading a config stays fast.
"""

from __future__ import annotations

import dataclasses
import functools

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

__all__ = [
    "CONFIG_MAPPING",
    "AutoConfig",
    "PreTrainedConfig",
    "SubConfigSpec",
    "written_by_transformers",
]

# Names that `PreTrainedConfig` accepts or writes although they are not dataclass fields.
_WRITTEN = (
    "attn_implementation",
    "auto_map",
    "base_model_tp_plan",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@functools.cache
def written_by_transformers() -> frozenset[str]:
    """Fields that transformers may write into any ``config.json``, or accepts next to the fields of a config."""
    fields = [field.name for field in dataclasses.fields(PreTrainedConfig)]
    return frozenset([*fields, *_WRITTEN, *GenerationConfig._get_default_generation_params()])

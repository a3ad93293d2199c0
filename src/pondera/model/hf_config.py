"""The names of transformers that configs need: importing these does not import any model.

Kept apart from `hf.py` because transformers imports `model/config.py` while its own model modules are still half-way.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

from packaging.version import Version
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

__all__ = [
    "CONFIG_MAPPING",
    "TESTED",
    "AutoConfig",
    "PreTrainedConfig",
    "SubConfigSpec",
    "installed",
    "tested",
    "written_by_transformers",
]

TESTED = ("5.23",)
"""Minor series of transformers that the contract suite passed on."""

# Names that are no dataclass field but that `PreTrainedConfig` takes or writes.
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


def installed() -> str:
    """The version of transformers that is installed; asked without importing it."""
    return importlib.metadata.version("transformers")


def tested(version: str) -> bool:
    """Whether the contract suite passed on the minor series of a version.

    Example:
        >>> tested("4.0.1")
        False
    """
    found = Version(version)
    return f"{found.major}.{found.minor}" in TESTED


@functools.cache
def written_by_transformers() -> frozenset[str]:
    """Fields that transformers itself may write into any ``config.json``, or takes wherever it takes a config's."""
    fields = [field.name for field in dataclasses.fields(PreTrainedConfig)]
    return frozenset([*fields, *_WRITTEN, *GenerationConfig._get_default_generation_params()])

"""The names of transformers that configs need: importing these does not import any model.

Kept apart from `hf.py`, which imports generation and attention code, so that reading a config stays light.
"""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

__all__ = ["CONFIG_MAPPING", "AutoConfig", "PreTrainedConfig", "SubConfigSpec"]

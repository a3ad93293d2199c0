"""The names of transformers that configs need: importing these does not import any model.

Kept apart from `hf.py` because transformers imports `model/config.py` while its own model modules are still half-way.
"""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

__all__ = ["CONFIG_MAPPING", "AutoConfig", "PreTrainedConfig", "SubConfigSpec"]

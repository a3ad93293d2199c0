"""Default target modules of PEFT for Pondera models."""

from __future__ import annotations

import sys

FAMILIES = ("llama", "gpt2", "gpt_neox")
"""Together they have the attention projections of all mapped architectures."""


def announce_to_peft(model_type: str) -> None:
    """Adds Pondera models to the tables of default target modules in PEFT, if PEFT is imported.

    PEFT has one table per adapter type, keyed by model type, and no function to extend it. The entry is the union of those of
    `FAMILIES`; names that a backbone does not have match nothing.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in vars(constants).items():
        if (
            name.startswith("TRANSFORMERS_MODELS_TO_")
            and name.endswith("_TARGET_MODULES_MAPPING")
            and isinstance(table, dict)
        ):
            layers = [layer for family in FAMILIES for layer in table.get(family, [])]
            if layers and isinstance(layers[0], str):
                table.setdefault(model_type, list(dict.fromkeys(layers)))

"""Which layers PEFT adapts of a Pondera model where nobody says."""

from __future__ import annotations

import sys

FAMILIES = ("llama", "gpt2", "gpt_neox")
"""Together they name the attention projections of every mapped architecture."""


def announce_to_peft(model_type: str) -> None:
    """Adds a line for Pondera models to PEFT's tables of default layers, if PEFT is imported and has none.

    PEFT looks a model type up in tables by the kind of adapter and has no other way to be told. The layers are those that
    it adapts in `FAMILIES`; names that a backbone does not have match nothing.
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

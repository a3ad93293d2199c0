"""Pondera: language models that weigh every token.

Heavy names load on first use, so that ``import pondera`` and the command line answer at once. Importing the package is
enough for `transformers.AutoModelForCausalLM.from_pretrained` to know Pondera's checkpoints.
"""

from __future__ import annotations

import importlib
from typing import Any

from pondera.model import auto

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveConfig": "pondera.model.config",
    "AdaptiveLM": "pondera.model.lm",
    "Backbone": "pondera.model.backbone",
    "TokenCache": "pondera.model.cache",
    "Think": "pondera.think.contract",
    "Thought": "pondera.think.contract",
    "UserError": "pondera.ground.errors",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

auto.announce()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pondera' has no attribute {name!r}; it offers {', '.join(__all__)}")

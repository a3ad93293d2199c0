"""Pondera: language models that weigh every token.

Names load on first use, so that ``import pondera`` and the command line answer at once. Using `AdaptiveLM` or
`AdaptiveConfig` registers both with transformers: from then on ``AutoConfig`` and ``AutoModelForCausalLM`` know
``model_type: pondera``. ``import pondera`` alone does not, as that would load torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveConfig": "pondera.models.config",
    "AdaptiveLM": "pondera.models.adaptive_lm",
    "Backbone": "pondera.models.backbone",
    "TokenCache": "pondera.cache.token_cache",
    "Think": "pondera.methods.think.base",
    "MethodOutput": "pondera.models.method",
    "UserError": "pondera.core.errors",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pondera' has no attribute {name!r}; it offers {', '.join(__all__)}")

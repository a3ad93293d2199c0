"""Pondera: language models that weigh every token.

Every method, quantizer, head and probe can be imported from here, in addition to the names below::

    from pondera import AdaptiveConfig, AdaptiveLM, H2O, PonderLM2, load

    model, tokenizer = load("path/to/model", kv_cache="H2O(0.25)")

Names load on first use, so that ``import pondera`` and the command line answer at once. Using `AdaptiveLM` or
`AdaptiveConfig` registers both with transformers: from then on ``AutoConfig`` and ``AutoModelForCausalLM`` know
``model_type: pondera``. ``import pondera`` alone does not, as that would load torch and transformers.
"""

from __future__ import annotations

from pondera.core.lazy_names import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(
    __name__,
    None,
    {
        "AdaptiveConfig": "pondera.models.config",
        "AdaptiveLM": "pondera.models.adaptive_lm",
        "Backbone": "pondera.models.backbone",
        "EditablePrompt": "pondera.inference.editable_prompt",
        "MethodOutput": "pondera.models.method",
        "PIE": "pondera.inference.pie",
        "Think": "pondera.methods.think.base",
        "TokenBatch": "pondera.models.method",
        "TokenCache": "pondera.cache.token_cache",
        "UserError": "pondera.core.errors",
        "compress": "pondera.evaluation.compress",
        "load": "pondera.evaluation.open_model",
    },
)

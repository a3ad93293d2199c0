"""The properties of a model that fitted tables depend on."""

from __future__ import annotations

from typing import Any

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.base import compressible


def fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """The properties of a model that its tables depend on."""
    return {
        "model_type": config.model_type,
        "layers": len(compressible(config)),
        "heads": kv_heads(config),
        "width": head_dim(config),
    }


def check_fingerprint(mine: dict[str, Any] | None, config: PreTrainedConfig) -> None:
    """Refuses tables that were fitted to another model."""
    theirs = fingerprint(config)
    if mine != theirs:
        raise UserError(
            f"these codebooks were fitted to {_words(mine or {})}, and this model is {_words(theirs)}; "
            "fit codebooks to this model: method.fit(model, samples)"
        )


def _words(found: dict[str, Any]) -> str:
    if not found:
        return "nothing"
    return "{model_type} with {layers} layers to compress, {heads} KV heads of width {width}".format(**found)

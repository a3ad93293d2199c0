"""Rolls back the layers of a cache together: all of them, or none.

Layers differ in what they can roll back: those of transformers by kind, those of a KV-cache method by what each has evicted or
encoded. `Cache.crop` rolls back one layer after the other, so a layer that refuses leaves earlier layers shorter than later
ones. Here every layer is checked before any layer changes.

Shapes: none.
"""

from __future__ import annotations

from typing import Any

from pondera.cache.state import CacheState
from pondera.core.errors import UserError


def check_layers(layers: list, kept: int, removed: int) -> None:
    """Raises if a layer cannot roll back, before anything changes.

    Args:
        layers: the layers of a cache: Pondera's and those of transformers.
        kept: the number of slots that stay in each layer.
        removed: the number of slots to roll back.

    Raises:
        UserError: the reason.
    """
    for layer in layers:
        if isinstance(layer, CacheState):
            layer.check_rollback(kept)
        elif kept and removed and (reason := _reason(layer, removed)):
            raise UserError(f"crop: cannot roll back {removed} slots, because {reason}")


def roll_back(layers: list, kept: int, removed: int) -> None:
    """Rolls back the last slots of all layers, after `check_layers`.

    Args:
        layers, kept, removed: as for `check_layers`.
    """
    for layer in layers:
        if isinstance(layer, CacheState):
            layer.crop(-removed)
        elif not kept:
            layer.reset()  # transformers selects no batch rows in a layer without tokens, so it must not keep any
        elif removed or _records(layer):
            layer.crop(-removed)


def _records(layer: Any) -> bool:
    """Whether a layer of transformers keeps what a rollback needs until `crop`."""
    return getattr(layer, "record_past", False)


def _reason(layer: Any, removed: int) -> str | None:
    """Why a layer of transformers cannot roll back, and what to do; `None` if it can."""
    if any(getattr(layer, "is_recurrent_states_initialized", {}).values()):
        return (
            "a linear-attention layer keeps only its last state; start with a new cache and pass the tokens that stay"
        )
    record = "call cache.activate_past_recording() before a call with draft tokens, or start with a new cache"
    if any(getattr(layer, "is_conv_states_initialized", {}).values()):
        widths = [(states.shape[-1], layer.conv_kernel_size[index]) for index, states in layer.conv_states.items()]
        if not _records(layer) or any(width - removed < least for width, least in widths):
            return f"a layer with a convolution keeps only the last inputs; {record}"
    window = getattr(layer, "sliding_window", None)
    if window is None or not layer.is_initialized or (seen := layer.get_seq_length()) < window:
        return None
    if _records(layer) and layer.keys.shape[-2] - removed >= min(window - 1, seen - removed):
        return None
    return f"a layer with a sliding window of {window} keeps only the last keys; {record}"

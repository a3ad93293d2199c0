"""Checks of a loaded cache: whether its numbers fit its tensors.

Shapes: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pondera.cache.state import BatchState, state_of

COUNTS = ("tokens", "seen", "used", "prompt", "cumulative_length")
"""Attributes that count tokens or slots."""
ROWS = ("keys", "values", "keys_BGSD", "values_BGSD")
"""Attributes with keys or values, whose last dimensions are slots and width."""


def check_numbers(cache: Any) -> None:
    """Raises if numbers of tokens are impossible, or keys and values are not numbers of the expected kind.

    Raises:
        ValueError: what is wrong.
    """
    for part in _parts(cache):
        values = _attributes(part)
        for name in COUNTS:
            if isinstance(count := values.get(name), int) and count < 0:
                raise ValueError(f"{name}={count}")
        for name in ROWS:
            rows = values.get(name)
            if isinstance(rows, Tensor) and (rows.numel() and rows.ndim != 4 or not rows.is_floating_point()):
                raise ValueError(f"{name} of {rows.ndim} dimensions and dtype {rows.dtype}")
        if (stored := values.get("keys_BGSD")) is not None and not 0 <= values["used"] <= stored.shape[2]:
            raise ValueError(f"used={values['used']} of {stored.shape[2]} slots")
        if (seen := values.get("seen")) is not None:
            # Only a store with all tokens in order has no more slots than tokens in every method.
            used = max((inner.used for inner in values.get("tables", ()) if inner.whole), default=0)
            if used > seen:
                raise ValueError(f"seen={seen}, and {used} slots are in use")
    passes_BT = getattr(cache, "passes_BT", None)
    if passes_BT is not None and passes_BT.shape[1] != cache.tokens:
        raise ValueError(f"tokens={cache.tokens}, and passes of {passes_BT.shape[1]} tokens")
    prefix_BT = getattr(cache, "prefix_BT", None)
    if prefix_BT is not None and prefix_BT.shape[1] < cache.tokens:
        raise ValueError(f"tokens={cache.tokens}, and hashes of {prefix_BT.shape[1]} tokens")


def _attributes(part: Any) -> dict[str, Any]:
    return state_of(part) if isinstance(part, BatchState) else vars(part)


def _parts(value: Any) -> Iterator[Any]:
    """All caches, layers and parts of layers in a value."""
    if isinstance(value, BatchState) or hasattr(value, "reorder_cache"):
        yield value
        value = _attributes(value)
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)

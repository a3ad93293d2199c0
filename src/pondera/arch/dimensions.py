"""KV heads, head width and the kind of each layer, as the config of a model gives them.

These functions import neither torch nor transformers, so that a cost can be computed without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pondera.core.errors import UserError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""The kinds of layers that Pondera knows, by the names that transformers gives them."""


class LayersDiffer(UserError):
    """A size that a method needs of all layers, where they differ or the config does not say.

    Args:
        model_type: of the config.
        name: what the config calls the size.

    Attributes:
        why: the error without the advice.
    """

    def __init__(self, model_type: str, name: str) -> None:
        self.why = f"its configuration has no {name} that holds for all layers"
        super().__init__(
            f"{model_type}: {self.why}; use PreallocatedCache() or an eviction method with one budget for all heads, such as "
            "H2O(256), or the stock cache"
        )


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, as transformers names it.

    Args:
        config: text config of the model.

    Example:
        >>> from types import SimpleNamespace
        >>> layer_kinds(SimpleNamespace(num_hidden_layers=2, sliding_window=8))
        ['sliding_attention', 'sliding_attention']
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [SLIDING if getattr(config, "sliding_window", None) else FULL] * config.num_hidden_layers
    return list(kinds)


def kv_heads(config: Any) -> int:
    """KV heads of a layer.

    Raises:
        LayersDiffer: the layers of the model differ, or its config does not say.
    """
    return _of_all_layers(config, "num_key_value_heads", lambda: config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Width of a head.

    Raises:
        LayersDiffer: the layers of the model differ, or its config does not say.

    Example:
        >>> from types import SimpleNamespace
        >>> head_dim(SimpleNamespace(hidden_size=64, num_attention_heads=4))
        16
    """
    return _of_all_layers(config, "head_dim", lambda: config.hidden_size // config.num_attention_heads)


def _of_all_layers(config: Any, name: str, otherwise: Callable[[], int]) -> int:
    try:
        return getattr(config, name, None) or otherwise()
    except Exception as error:  # transformers raises one of its own where layers differ
        raise LayersDiffer(config.model_type, name) from error

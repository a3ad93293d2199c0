"""Decoder layers that do not run the tokens of a prompt that do not go on: hooks on a model.

A cache sees keys and values only. What goes on is chosen by one of its layers (`passing.py`); hooks before the decoder layers
behind it take the hidden states of the other tokens away, and one after the last puts zeros in their place.

Shapes: B batch, T tokens of a call, k those that go on, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pondera.memory.parts.passing import Choice, ChoosingLayer, PassedLayer
from pondera.model.backbone import LAYOUTS
from pondera.model.hf import Cache, PreTrainedModel


def pack(model: PreTrainedModel, cache: Cache, chooser: ChoosingLayer) -> None:
    """Has the decoder layers behind a chooser run the tokens that go on, and no others, if all of them can.

    The hooks are set once for a model, and do nothing for calls with other caches.
    """
    layout = LAYOUTS.get(model.config.get_text_config(decoder=True).model_type)
    behind = cache.layers[cache.layers.index(chooser) + 1 :]
    if layout is None or not all(isinstance(layer, PassedLayer) for layer in behind):
        return
    chooser.packs = True
    layers: nn.ModuleList = getattr(model.get_decoder(), layout.layers)
    if any(isinstance(hook, _LeaveOut) for hook in layers[0]._forward_pre_hooks.values()):
        return
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_LeaveOut(number, layout.cache_argument), with_kwargs=True)
    layers[-1].register_forward_hook(_PutBack(len(layers) - 1, layout.cache_argument), with_kwargs=True)


@dataclass(frozen=True)
class _Hook:
    """On a decoder layer.

    Args:
        number: of the layer.
        cache_argument: what the layer calls its cache.
    """

    number: int
    cache_argument: str

    def choice(self, kwargs: dict[str, Any]) -> Choice | None:
        """Which tokens of this call go on, where that is for the decoder layer to see to."""
        cache = kwargs.get(self.cache_argument)
        layer = cache.layers[self.number] if isinstance(cache, Cache) and self.number < len(cache.layers) else None
        return layer.chooser.choice if isinstance(layer, PassedLayer) and layer.chooser.packs else None


class _LeaveOut(_Hook):
    """Before a layer: its states and their rotary positions without the tokens that do not go on.

    The mask stays as it is: it is read by the layer of the cache, which knows of the choice.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        choice = self.choice(kwargs)
        if choice is None or not args:
            return None
        h_BTD, *others = args
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = choice.rows(kwargs["position_ids"], 1)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(choice.rows(part, 1) for part in kwargs["position_embeddings"])
        return (choice.rows(h_BTD, 1), *others), kwargs


class _PutBack(_Hook):
    """After the last layer: states of all tokens again, those left out as zeros."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out_BkD: Tensor) -> Tensor:
        choice = self.choice(kwargs)
        return out_BkD if choice is None or out_BkD.shape[1] == choice.tokens else choice.put_back(out_BkD)

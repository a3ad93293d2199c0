"""Decoder layers that run the tokens that go on, and no others: hooks on a model.

A cache sees keys and values only. What goes on is chosen by its layers (`passing.py`); hooks before the decoder layers
behind them take the hidden states of the other tokens away, and one after the last puts zeros in their place.

Shapes: B batch, T tokens of a call, k those that go on, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pondera.arch.families import modules
from pondera.core.hf import CACHE, Cache, PreTrainedModel
from pondera.methods.kv_cache.common.token_pruning import PrunedLayer, SelectorLayer


def pack(model: PreTrainedModel, cache: Cache) -> None:
    """Has the decoder layers behind those that choose run the tokens that go on, and no others, if all of them can.

    The hooks are set once for a model, and do nothing for calls with other caches.
    """
    parts = modules(model.config.get_text_config(decoder=True))
    choosers = [layer for layer in cache.layers if isinstance(layer, SelectorLayer)]
    behind = cache.layers[cache.layers.index(choosers[0]) + 1 :] if choosers else []
    if parts is None or not parts.layers_skip_tokens:
        return
    if not behind or not all(isinstance(layer, PrunedLayer) for layer in behind):
        return
    for chooser in choosers:
        chooser.packs = True
    layers: nn.ModuleList = getattr(model.get_decoder(), parts.layers)
    if any(isinstance(hook, _LeaveOut) for hook in layers[0]._forward_pre_hooks.values()):
        return
    argument = parts.cache_argument or CACHE
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_LeaveOut(number, argument), with_kwargs=True)
    layers[-1].register_forward_hook(_PutBack(len(layers) - 1, argument), with_kwargs=True)


@dataclass(frozen=True)
class _Hook:
    """On a decoder layer.

    Args:
        number: of the layer.
        cache_argument: what the layer calls its cache.
    """

    number: int
    cache_argument: str

    def chooser(self, kwargs: dict[str, Any]) -> SelectorLayer | None:
        """The layer that chose what goes on in this call, where that is for the decoder layer to see to."""
        cache = kwargs.get(self.cache_argument)
        layer = cache.layers[self.number] if isinstance(cache, Cache) and self.number < len(cache.layers) else None
        chooser = layer.chooser if isinstance(layer, PrunedLayer) else None
        return chooser if chooser is not None and chooser.choice is not None and chooser.choice.packed else None


class _LeaveOut(_Hook):
    """Before a layer: the states and rotary rows of the tokens that go on, in place of all of the call's.

    The mask stays as it is: it is read by the layer of the cache, which knows of the choice. Positions are in the
    rotary rows.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        chooser = self.chooser(kwargs)
        if chooser is None:
            return None
        h_BTD, *others = args
        if kwargs[self.cache_argument].layers[self.number - 1] is chooser:
            h_BTD = chooser.lead(h_BTD, kwargs["position_embeddings"])
        return (h_BTD, *others), kwargs | {"position_ids": None, "position_embeddings": chooser.rotary}


class _PutBack(_Hook):
    """After the last layer: states of the call's tokens again, those left out as zeros."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out_BkD: Tensor) -> Tensor:
        chooser = self.chooser(kwargs)
        for layer in kwargs[self.cache_argument].layers if chooser is not None else ():
            if isinstance(layer, SelectorLayer):
                layer.rotary = ()
        return out_BkD if chooser is None or chooser.choice is None else chooser.choice.put_back(out_BkD)

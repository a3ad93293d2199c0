"""Forward hooks that drop pruned tokens from the hidden states of later layers.

A cache only receives keys and values, and its layers (`token_pruning.py`) select the tokens that continue. Hooks before
the later decoder layers remove the hidden states of the other tokens; a hook after the last layer inserts zeros for
them.

Shapes: B batch, T tokens of a call, k tokens that continue, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pondera.arch.families import modules
from pondera.core.hf import CACHE, Cache, PreTrainedModel
from pondera.methods.kv_cache.common.token_pruning import PrunedLayer, SelectorLayer


def pack(model: PreTrainedModel, cache: Cache) -> None:
    """Makes the decoder layers after the selecting layers skip pruned tokens, if all of them support it.

    The function sets the hooks once per model; they do nothing in calls with other caches.
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
    """A hook on a decoder layer.

    Args:
        number: index of the layer.
        cache_argument: name of the layer's cache argument.
    """

    number: int
    cache_argument: str

    def chooser(self, kwargs: dict[str, Any]) -> SelectorLayer | None:
        """The selecting layer of this call, if the decoder layer must skip pruned tokens."""
        cache = kwargs.get(self.cache_argument)
        layer = cache.layers[self.number] if isinstance(cache, Cache) and self.number < len(cache.layers) else None
        chooser = layer.chooser if isinstance(layer, PrunedLayer) else None
        return chooser if chooser is not None and chooser.choice is not None and chooser.choice.packed else None


class _LeaveOut(_Hook):
    """Before a layer: replaces hidden states and rotary embedding by those of the tokens that continue.

    The mask stays unchanged: the cache layer reads it and knows the selection. The rotary embedding contains the
    positions.
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
    """After the last layer: restores the hidden states of all tokens of the call, zeros for pruned ones."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out_BkD: Tensor) -> Tensor:
        chooser = self.chooser(kwargs)
        for layer in kwargs[self.cache_argument].layers if chooser is not None else ():
            if isinstance(layer, SelectorLayer):
                layer.rotary = ()
        return out_BkD if chooser is None or chooser.choice is None else chooser.choice.put_back(out_BkD)

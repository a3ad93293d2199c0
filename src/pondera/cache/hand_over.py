"""Connects the attention modules of a model with the layers of the cache that a call passes.

Each attention module gets a finder (`pondera.cache.attention`), which inspects the cache argument of a call. If the cache
is one of Pondera's (`pondera.methods.kv_cache.base.KVCache`), the layer with the module's index serves the attention call.
With any other cache, the model runs unchanged.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pondera.cache.attention import SERVED, asks_for_sdpa, finder, implementation, is_routed, route, set_finder, unroute
from pondera.cache.layer import KVLayer
from pondera.cache.self_check import Verdict, compare_with_stock
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel

ARGUMENTS = ("past_key_values", "layer_past", "cache", "past_key_value")
"""The names of the cache argument of attention modules in transformers."""


@dataclass(eq=False)
class Owner:
    """The identity of the model object that a cache belongs to; a copy of the model has another owner.

    Args:
        verdicts: results of `compare_with_stock`, by attention implementation, dtype and compressed layers.
    """

    verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Finder:
    """Finds the layer that serves a call of an attention module, from the cache argument of the call.

    Args:
        owner: the owner of the module.
        argument: the name of the cache argument.
        place: the index of the cache argument among positional arguments.
    """

    owner: Owner
    argument: str
    place: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KVLayer | None:
        """See `pondera.cache.attention.Finder`.

        Raises:
            UserError: the cache belongs to another model object, or contains half of a call that ended in an error.
        """
        cache: Any = kwargs.get(self.argument)
        if cache is None and len(args) > self.place:
            cache = args[self.place]
        if cache is None or (owner := getattr(cache, "owner", None)) is None:
            return None
        if owner is not self.owner:
            raise UserError(
                "this cache was created for another model object; create one for this model: method.cache(model), or use "
                "one model object for all calls with a cache"
            )
        layer = cache.layers[module.layer_idx]
        if not isinstance(layer, KVLayer):
            return None
        first, last = cache.kept[0], cache.kept[-1]
        if layer is first and (first.seen != last.seen or first.pending or last.pending):
            raise UserError(
                "this cache contains half of a call that ended in an error: its layers have seen different numbers of "
                "tokens; create a new cache, or call cache.reset() first"
            )
        layer.expected = True
        return layer


def hand_over(model: PreTrainedModel, method: str, layers: list[int]) -> tuple[Owner, Verdict | None]:
    """Routes a model's attention to the layers of Pondera's caches, once, and checks that the logits stay correct.

    Args:
        model: any causal LM of transformers.
        method: the name of the method, for error messages.
        layers: indices of the compressed layers.

    Returns:
        The owner of caches of this model, and the result of the self-check: `None` for a model without weights, which
        cannot run.

    Raises:
        UserError: the model is not supported; the message names the reason.
    """
    known = is_routed(model)
    try:
        owner = _install(model, layers)
        key = (implementation(model), model.dtype, tuple(layers))
        if key not in owner.verdicts and model.device.type != "meta":
            owner.verdicts[key] = compare_with_stock(model, owner, layers)
        return owner, owner.verdicts.get(key)
    except UserError as error:
        if not known:
            unroute(model)
        raise UserError(
            f"{method}: {name(model)} is not supported: {error}; use the stock cache, DynamicCache"
        ) from None


def name(model: PreTrainedModel) -> str:
    """The class name of a model, with its model type."""
    return f"{type(model).__name__} ({model.config.get_text_config(decoder=True).model_type})"


def _install(model: PreTrainedModel, layers: list[int]) -> Owner:
    """Sets the finder of each attention module; returns the owner of the model."""
    if (own := implementation(model)) not in SERVED:
        raise UserError(
            f"its attention implementation is {own!r}, whose masks do not determine which tokens a query sees; call "
            "model.set_attn_implementation('sdpa') first"
        )
    modules = {module: _argument(module) for module in route(model)}
    modules = {module: argument for module, argument in modules.items() if argument and hasattr(module, "layer_idx")}
    if missing := sorted(set(layers) - {module.layer_idx for module in modules}):
        raise UserError(
            f"attention in its layers {_listed(missing)} does not go through transformers' attention interface, or its "
            "modules have no layer_idx"
        )
    if any(asks_for_sdpa(module) for module in modules):
        raise UserError("its attention asks for the name of its implementation and changes the mask accordingly")
    owner = next((known.owner for module in modules if isinstance(known := finder(module), Finder)), None) or Owner()
    for module, argument in modules.items():
        assert argument is not None
        set_finder(module, Finder(owner, *argument))
    return owner


def _argument(module: nn.Module) -> tuple[str, int] | None:
    """The name and the index of the cache argument of a module, from the nearest class whose forward has one."""
    for kind in type(module).__mro__:
        names = (
            list(inspect.signature(inspect.unwrap(forward)).parameters)[1:]
            if (forward := vars(kind).get("forward"))
            else []
        )
        if argument := next((each for each in ARGUMENTS if each in names), None):
            return argument, names.index(argument)
    return None


def _listed(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else " and ".join(map(str, numbers))

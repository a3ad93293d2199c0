"""How the attention modules of a model find the layer of the cache that they were called with.

A finder on each attention module (`pondera.cache.attention`) looks at the cache that the module was given. Of a
`MemoryCache` it takes the layer with the module's number, which then serves the module's attention call. Of any other
cache it takes nothing, and the model behaves as if it had never seen Pondera.
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
"""What attention modules of transformers call their cache."""


@dataclass(eq=False)
class Owner:
    """The model that caches are made for, told apart from every other model, copies included.

    Args:
        verdicts: what `compare_with_stock` found, by attention implementation, dtype and compressed layers.
    """

    verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Finder:
    """Finds the layer of the cache that an attention module was called with.

    Args:
        owner: of the module.
        argument: what the module calls its cache.
        place: of that argument where it is given without its name.
    """

    owner: Owner
    argument: str
    place: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KVLayer | None:
        """See `pondera.cache.attention.Finder`."""
        cache: Any = kwargs.get(self.argument)
        if cache is None and len(args) > self.place:
            cache = args[self.place]
        if cache is None or (owner := getattr(cache, "owner", None)) is None:
            return None
        if owner is not self.owner:
            raise UserError(
                "this cache was made for another model object; make one for this model: method.cache(model), or use one "
                "model object for all calls with a cache"
            )
        layer = cache.layers[module.layer_idx]
        if not isinstance(layer, KVLayer):
            return None
        layer.expected = True
        return layer


def hand_over(model: PreTrainedModel, method: str, layers: list[int]) -> tuple[Owner, Verdict | None]:
    """Has a model's attention find its layers in caches, once, and checks that this is right.

    Args:
        model: any causal LM of transformers.
        method: what asks, for errors.
        layers: numbers of the layers that are compressed.

    Returns:
        Whom caches of this model belong to; and what the check found, `None` where a model without weights cannot be run.

    Raises:
        UserError: this model cannot be served, and why.
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
    """The class of a model and the type of its configuration."""
    return f"{type(model).__name__} ({model.config.get_text_config(decoder=True).model_type})"


def _install(model: PreTrainedModel, layers: list[int]) -> Owner:
    """Gives each attention module its finder."""
    if (own := implementation(model)) not in SERVED:
        raise UserError(
            f"its attention is {own!r}, whose masks do not say which tokens a query sees; call "
            "model.set_attn_implementation('sdpa') first"
        )
    modules = {module: _argument(module) for module in route(model)}
    modules = {module: found for module, found in modules.items() if found and hasattr(module, "layer_idx")}
    if missing := sorted(set(layers) - {module.layer_idx for module in modules}):
        raise UserError(
            f"attention in its layers {_listed(missing)} does not go through transformers' attention interface, or does not "
            "say which layer it is"
        )
    if any(asks_for_sdpa(module) for module in modules):
        raise UserError("its attention asks for the name of its implementation and changes the mask by it")
    owner = next((known.owner for module in modules if isinstance(known := finder(module), Finder)), None) or Owner()
    for module, found in modules.items():
        assert found is not None
        set_finder(module, Finder(owner, *found))
    return owner


def _argument(module: nn.Module) -> tuple[str, int] | None:
    """What a module calls its cache, and the place of that argument; of the nearest class that names it."""
    for kind in type(module).__mro__:
        names = (
            list(inspect.signature(inspect.unwrap(forward)).parameters)[1:]
            if (forward := vars(kind).get("forward"))
            else []
        )
        if found := next((each for each in ARGUMENTS if each in names), None):
            return found, names.index(found)
    return None


def _listed(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else " and ".join(map(str, numbers))

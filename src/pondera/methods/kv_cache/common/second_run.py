"""A second run of the model at the end of its first call, for methods that score the whole cache with it.

A cache layer cannot run the model, so hooks on the decoder do so: after the first call, or, if its tokens may be draft
tokens, before the call that follows their `crop`. The second run reads the slots of the cache and leaves no trace in it.

Shapes: B batch, T tokens of the prompt, N tokens of one run, K tokens seen and new, D width of hidden states.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.evaluation_mode import as_it_was
from pondera.core.hf import CACHE, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.policy import Policy

INPUTS, POSITIONS = "inputs", "position_ids"
"""The names in `KVStoreLayer.state` of what the second run needs, while tokens of the prompt may be draft tokens."""

Observer = Callable[["ReadingLayer", AttentionCall], None]


class ReadingLayer(KVLayer):
    """Attends to all slots of another layer and to the new tokens, and stores nothing.

    Args:
        source: the layer, from which nothing has been evicted.
        observer: receives every call.
    """

    def __init__(self, source: KVStoreLayer, observer: Observer) -> None:
        super().__init__()
        self.source, self.observer, self.seen = source, observer, source.seen

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`."""
        pairs = zip(self.source.joined(), (call.key_BGTD, call.value_BGTD), strict=True)
        out_BTHD = call.stock(*(torch.cat(pair, dim=2) for pair in pairs))
        self.observer(self, call)
        return out_BTHD

    def rollback(self, tokens: int) -> None:
        """Never called: nothing is stored."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of the first call, and what is needed to run the model again after them.

    Args:
        decoder: the decoder of the model.
        cache: its cache, whose layers contain all tokens of the prompt.
        input_BTD: input vectors.
        position_BT: position ids; batch may be 1.
        real_BT: false for padding.
    """

    decoder: nn.Module
    cache: KVCache
    input_BTD: Tensor
    position_BT: Tensor
    real_BT: Tensor

    @property
    def layers(self) -> list[KVStoreLayer]:
        """The compressed layers."""
        return [layer for layer in self.cache.kept if isinstance(layer, KVStoreLayer)]

    def embed(self, ids: list[int]) -> Tensor:
        """``[B, N, D]``: the input vectors of these tokens."""
        ids_1N = torch.tensor([ids], dtype=torch.long, device=self.input_BTD.device)
        return _embedded(self.decoder, ids_1N).expand(len(self.input_BTD), -1, -1)

    def run(self, input_BND: Tensor, real_BN: Tensor, observer: Observer) -> None:
        """Runs the decoder on some tokens after the prompt; the cache does not change.

        Args:
            input_BND: their input vectors.
            real_BN: false for padding.
            observer: receives the attention call of every compressed layer.

        Raises:
            UserError: the model has too few positions.
        """
        last_B1 = self.position_BT.expand_as(self.real_BT).masked_fill(~self.real_BT, -1).amax(-1, keepdim=True)
        position_BN = (last_B1 + real_BN.long().cumsum(-1)).clamp(min=0)
        config: Any = self.decoder.config
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and (needed := int(position_BN.max()) + 1) > most:
            raise UserError(
                f"{type(self.cache.method).__name__}: reads a part of the prompt a second time after it, up to position "
                f"{needed}, and this {config.model_type} has {most} positions; give a shorter prompt, or read smaller parts "
                "(chunk=512)"
            )
        layers = [
            ReadingLayer(layer, observer) if isinstance(layer, KVStoreLayer) else copy.deepcopy(layer)
            for layer in self.cache.layers
        ]
        call: dict[str, Any] = {
            "inputs_embeds": input_BND,
            "attention_mask": torch.cat([self.real_BT, real_BN], dim=1).long(),
            "position_ids": position_BN,
            CACHE: KVCache(layers, self.cache.method, self.cache.owner),
            "use_cache": True,
        }
        self.decoder(**call)


class AfterPrompt(Protocol):
    """What `_settle` calls at the end of the prompt."""

    def after_prompt(self, prompt: Prompt) -> None:
        """See `SecondRun.after_prompt`."""


class SecondRun(Policy):
    """A policy that evicts once: after the first call, the prompt, which it may run through the model again."""

    prefill_only: bool = True

    @property
    def second_run(self) -> Self:
        """See `Policy.second_run`."""
        return self

    @abstractmethod
    def after_prompt(self, prompt: Prompt) -> None:
        """Evicts slots of the prompt; called once per cache, in evaluation mode and without gradients."""

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`: sets the hooks, once per model; they do nothing in calls with other caches."""
        decoder = model.get_decoder()
        if not any(isinstance(hook, _AfterCall) for hook in decoder._forward_hooks.values()):
            decoder.register_forward_pre_hook(_before_call, with_kwargs=True)
            decoder.register_forward_hook(_AfterCall(), with_kwargs=True)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        raise UserError(
            f"{type(self).__name__} runs the model again on the tokens of the prompt, and the decoder of a model with a "
            "think or chunk method does not read tokens; use SnapKV(1024)"
        )

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> Any:
        """See `KVCacheMethod.token_cache`: refused, also with one slot per token."""
        self.check_passes()


def _before_call(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call: evicts if a `crop` has settled which tokens are the prompt."""
    if (cache := _served(kwargs)) is not None:
        _settle(decoder, cache)


class _AfterCall:
    """After a call: remembers the inputs of the prompt, and evicts unless they may be draft tokens."""

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (cache := _served(kwargs)) is None:
            return
        layer = cache.kept[0]
        assert isinstance(layer, KVStoreLayer)
        given: Any = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", next(iter(args), None)) if given is None else given
        B, T = given.shape[:2]
        if INPUTS not in layer.state and layer.seen > T:
            return  # the prompt is over
        input_BTD = given if given.ndim == 3 else _embedded(decoder, given)
        position_BT = kwargs.get("position_ids")
        if position_BT is None:
            position_BT = torch.arange(layer.seen - T, layer.seen, device=input_BTD.device)[None]
        if position_BT.ndim != 2:
            raise UserError(f"{type(cache.method).__name__}: needs one position per token, not {position_BT.ndim - 1}")
        for name, new in ((INPUTS, input_BTD.detach()), (POSITIONS, position_BT.expand(B, T))):
            layer.state[name] = torch.cat([layer.state[name], new], 1) if name in layer.state else new
        _settle(decoder, cache)


def _embedded(decoder: Any, ids_BN: Tensor) -> Tensor:
    return decoder.get_input_embeddings()(ids_BN)


def _served(kwargs: dict[str, Any]) -> KVCache | None:
    """The cache of a call, if its method runs the model a second time and this is not that run."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, KVCache) or not isinstance(cache.kept[0], KVStoreLayer):
        return None
    return None if _second_run(cache) is None else cache


def _second_run(cache: KVCache) -> AfterPrompt | None:
    return cache.method.second_run if isinstance(cache.method, Policy) else None


def _settle(decoder: nn.Module, cache: KVCache) -> None:
    """Calls `SecondRun.after_prompt` once it is known which tokens are the prompt."""
    layer, method = cache.kept[0], _second_run(cache)
    assert isinstance(layer, KVStoreLayer) and method is not None
    if INPUTS not in layer.state or layer.drafted:
        return
    inputs, positions = (layer.state.pop(name)[:, : layer.seen] for name in (INPUTS, POSITIONS))
    if not layer.seen:
        return
    for kept in cache.kept:
        kept.renew()
    real_BT = layer.tables[0].position[:, 0] >= 0
    with as_it_was(decoder):
        method.after_prompt(Prompt(decoder, cache, inputs, positions, real_BT))

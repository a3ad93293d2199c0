"""The seam `kv_cache`: methods that decide which keys and values a model keeps, and in which form.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from pondera.arch.dimensions import FULL, head_dim, kv_heads, layer_kinds
from pondera.cache.compressed_slots import CompressedSlotCache
from pondera.cache.hand_over import Owner, hand_over, name
from pondera.cache.identity import identity
from pondera.cache.io import load, save
from pondera.cache.layer import KVLayer
from pondera.cache.rollback import check_layers, roll_back
from pondera.cache.slot_layer import KeepAll, KVStoreLayer
from pondera.cache.state import BatchState, kept_after
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from pondera.core.spec_repr import SpecRepr

log = logging.getLogger(__name__)

_OF_CACHES = frozenset(("get_seq_length", "get_mask_sizes", "is_compileable", "max_cache_len", "is_sliding", "layers"))
"""Attributes that callers look up on a cache, and never on a method."""


class NoCache(UserError, AttributeError):
    """Raised if a method is passed where its cache is expected; `hasattr` treats it as a missing attribute."""


class KVCache(BatchState, Cache):
    """The cache of a KV cache method: a transformers cache, for `generate` and for plain calls of any model.

    Args:
        layers: one per decoder layer; layers that are not a `KVLayer` are those of transformers.
        method: the method that created the cache.
        owner: the model of the cache.

    Attributes:
        kept: the layers that the method created.
        model: what identifies the model of the cache, see `pondera.cache.identity`; empty: not known.
    """

    holds: ClassVar[tuple[str, ...]] = ("layers",)
    shared: ClassVar[tuple[str, ...]] = ("method", "owner")

    def __init__(self, layers: list, method: KVCacheMethod, owner: Owner) -> None:
        super().__init__(layers=layers)
        self.method, self.owner, self.model = method, owner, ""
        self.kept: list[KVLayer] = [layer for layer in layers if isinstance(layer, KVLayer)]

    def crop(self, tokens_to_remove: int) -> None:
        """See `CacheState.crop`.

        Raises:
            UserError: the number is positive, or more tokens than have been seen or can be rolled back.
        """
        kept = kept_after(self.get_seq_length(), tokens_to_remove)
        check_layers(self.layers, kept, -tokens_to_remove)
        roll_back(self.layers, kept, -tokens_to_remove)

    def save(self, path: str | Path) -> Path:
        """Writes the cache into a safetensors file; `KVCacheMethod.load_cache` reads it.

        Raises:
            UserError: some tokens may still be rolled back.
        """
        return save(self, repr(self.method), path)


class KVCacheMethod(SpecRepr, nn.Module, ABC):
    """Decides which keys and values of earlier tokens a model keeps, and in which form.

    A KV cache method works on any causal LM of transformers and does not change its weights::

        method = StreamingLLM(budget=1024)
        model.generate(**prompt, past_key_values=method.cache(model))

    and in a run or a config as ``kv_cache: StreamingLLM(budget=1024)``. Its results must be bit-identical to those of
    the stock cache as long as it need not evict anything, and must not depend on padding or batch. The contract tests
    check every file of this folder.

    The class attributes `paper` and `cost` state its source and its cost in plain words (``pondera methods`` prints
    them).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests.

    ``"exact"``: evicts nothing within 64 tokens; ``"tight"``: keeps at most 8 of 12 tokens (a name with ``"-share"``:
    half of them). Further names come in pairs, such as ``"exact-heads"`` and ``"tight-heads"``.
    """

    saves: ClassVar[str] = "bytes"
    """What the method reduces.

    ``"bytes"``: the size of the cache. For methods that keep all tokens: ``"reading"`` in attention, ``"compute"`` in
    whole layers, or ``"nothing"``.
    """
    prunes_hidden_states: ClassVar[bool] = False
    """Whether it drops tokens from the hidden states between layers."""
    fitted: bool = True
    """False if the method needs `fit` first."""

    @property
    def needs_rows_of_config(self) -> bool:
        """Whether its layers require the number and width of KV heads that the model's configuration states."""
        return False

    def bind(self, config: PreTrainedConfig) -> None:  # noqa: B027 (optional: for those that have weights)
        """Creates tensors that depend on the model, such as empty codebooks, so that a checkpoint can fill them.

        Args:
            config: text config of the model.
        """

    @abstractmethod
    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVLayer:
        """Returns an empty cache layer.

        Args:
            config: text config of the model.
            index: of the layer among the compressed ones.
            among: number of compressed layers.
        """

    def fit(self, model: PreTrainedModel, samples: Iterable[Tensor]) -> Self:
        """Calibrates the method on text; most methods need no calibration.

        Args:
            model: the model whose KV cache the method compresses.
            samples: token ids, ``[B, T]`` each.
        """
        return self

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:  # noqa: B027 (optional)
        """Raises if the method does not support a model.

        Args:
            config: text config of the model.
            layers: indices of the layers to compress.
        """

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:  # noqa: B027 (optional)
        """Called with the model and all layers of a new cache, before the first forward.

        Args:
            model: the model of the cache.
            cache: the empty cache.
        """

    def cache(self, model: PreTrainedModel) -> KVCache:
        """An empty cache for this model; from now on the attention modules of the model check for such caches.

        The first call runs a self-check: it compares a few tokens with the stock cache. With any other cache the
        behavior of the model does not change.

        Args:
            model: any causal LM of transformers.

        Raises:
            UserError: the model has no layer to compress, the method needs `fit` first, or the self-check fails.
        """
        if not self.fitted:
            raise UserError(
                f"{type(self).__name__} has not been fitted to a model yet: method.fit(model, samples), or on the "
                "command line: pondera compress MODEL --kv-cache ... --calibrate TEXT"
            )
        config = model.config.get_text_config(decoder=True)
        stock = DynamicCache(config=config).layers or [None] * config.num_hidden_layers
        chosen = compressible(config)
        self.check(config, chosen)
        layers = [
            self.layer(config, chosen.index(number), len(chosen)) if number in chosen else layer
            for number, layer in enumerate(stock)
        ]
        owner, verdict = hand_over(model, type(self).__name__, chosen)
        if verdict is not None and self.needs_rows_of_config:
            stated = (kv_heads(config), head_dim(config), head_dim(config))
            if other := next((rows for rows in verdict.rows if rows != stated), None):
                raise UserError(
                    f"{type(self).__name__}: {name(model)} is not supported: its configuration states {stated[0]} KV "
                    f"heads of width {stated[1]}, but its attention gets {other[0]} KV heads with keys of width "
                    f"{other[1]} and values of width {other[2]}; use PreallocatedCache() or an eviction method "
                    "with one budget for all heads, such as H2O(256)"
                )
        cache = KVCache(layers, self, owner)
        cache.model = identity(model)
        self.prepare(model, cache)
        return cache

    def __getattr__(self, name: str) -> Any:
        if name in _OF_CACHES:
            raise NoCache(f"past_key_values: {self!r} is a method, not a cache; pass {self!r}.cache(model)")
        return super().__getattr__(name)

    def slot_cache(self, model: PreTrainedModel, windowed: list[bool], slots_per_token: int) -> CompressedSlotCache:
        """An empty cache for a think method that runs several passes per token, in layers of this KV cache method.

        Args:
            model: any causal LM of transformers.
            windowed: which decoder layers have a sliding window; the cache keeps and masks all their KV slots.
            slots_per_token: maximum number of KV slots per token.

        Raises:
            UserError: see `cache`; or this method drops tokens between layers.
        """
        self.check_passes()
        view = self.cache(model)

        def make() -> list[KVLayer]:
            layers = self.cache(model).layers
            return [layer if isinstance(layer, KVLayer) else KVStoreLayer(KeepAll(), 0, 1) for layer in layers]

        def cache_of(layers: list) -> KVCache:
            return KVCache(layers, self, view.owner)

        window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
        return CompressedSlotCache(make, cache_of, windowed, window, slots_per_token)

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> TokenCache:
        """An empty cache for a think method with consecutive KV slots per token, in layers of this KV cache method.

        Args:
            model: any causal LM of transformers.
            slots_per_token: KV slots of each token in every layer.

        Raises:
            UserError: see `slot_cache`.
        """
        if slots_per_token > 1:
            self.check_passes()
        view = self.cache(model)
        return TokenCache(view.layers, slots_per_token, view)

    def check_passes(self) -> None:
        """Raises if the method does not support several KV slots per token.

        Raises:
            UserError: the reason.
        """
        if self.prunes_hidden_states:
            raise UserError(
                f"{type(self).__name__} drops tokens from the hidden states between layers, and a think method feeds "
                "the final state of every token back; use a method that changes only the cache, such as SnapKV(1024)"
            )

    def load_cache(self, model: PreTrainedModel, path: str | Path) -> KVCache:
        """Reads a cache that `KVCache.save` has written, onto the device of the model; `generate` continues from it.

        Args:
            model: the model that filled the cache.
            path: the file.

        Raises:
            UserError: there is no such file, or it belongs to another method or model.
        """
        cache = self.cache(model)
        load(cache, repr(self), path, model.device)
        return cache


def compressible(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers with full attention; layers with sliding windows or recurrent states stay as they are.

    Raises:
        UserError: there is none.
    """
    kinds = layer_kinds(config)
    chosen = [number for number, kind in enumerate(kinds) if kind == FULL]
    others = sorted(set(kinds) - {FULL})
    if not chosen:
        raise UserError(
            f"{config.model_type}: all its layers are {' or '.join(others)}, and Pondera compresses only full "
            "attention; there is nothing to compress, use the model with its stock cache"
        )
    if others:
        log.info("compressing %d of %d layers, not %s", len(chosen), len(kinds), " and ".join(others))
    return chosen

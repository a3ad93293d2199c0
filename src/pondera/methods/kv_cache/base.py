"""The seam `memory/`: how much of the past is kept, and in what form.

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
from pondera.cache.io import load, save
from pondera.cache.layer import KVLayer
from pondera.cache.slot_layer import KeepAll, KVStoreLayer
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.core.hf import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from pondera.core.spec_repr import SpecRepr

log = logging.getLogger(__name__)

_OF_CACHES = frozenset(("get_seq_length", "get_mask_sizes", "is_compileable", "max_cache_len", "is_sliding", "layers"))
"""What is asked of a cache, and never of a method."""


class NoCache(UserError, AttributeError):
    """A method was given where a cache of it is wanted; for whoever only looks, an attribute that is not there."""


class KVCache(Cache):
    """A cache of memories: an ordinary transformers cache, for `generate` and for plain calls of any model.

    Args:
        layers: one per decoder layer; those that are no `KVLayer` are transformers' own.
        method: what made it.
        owner: the model that it is for.

    Attributes:
        kept: the layers that the memory has made.
    """

    def __init__(self, layers: list, method: KVCacheMethod, owner: Owner) -> None:
        super().__init__(layers=layers)
        self.method, self.owner = method, owner
        self.kept: list[KVLayer] = [layer for layer in layers if isinstance(layer, KVLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See transformers; refuses to go on from a forward that ended halfway."""
        first, last = self.kept[0], self.kept[-1]
        layer: Any = self.layers[layer_idx]
        if layer is first and (first.seen != last.seen or first.pending or last.pending):
            raise UserError(
                "this cache holds half of a call that ended in an error: its layers have seen different numbers of tokens; "
                "begin with a new cache, or call cache.reset() first"
            )
        return layer.update(key_states, value_states, *args, **kwargs)

    def nbytes(self) -> int:
        """Bytes of the storage of all layers, spare room included."""
        from pondera.cost.measure import live_cache_bytes

        return live_cache_bytes(self)

    def save(self, path: str | Path) -> Path:
        """Writes all that is kept into a safetensors file, to be read on from later; `KVCacheMethod.load_cache` reads it.

        Raises:
            UserError: some tokens are drafts still.
        """
        return save(self.layers, repr(self.method), path)


class KVCacheMethod(SpecRepr, nn.Module, ABC):
    """Decides what a model keeps of the tokens that it has read.

    A memory works on any causal LM of transformers without touching its weights::

        method = StreamingLLM(budget=1024)
        model.generate(**prompt, past_key_values=method.cache(model))

    and in a run or a config as ``kv_cache: StreamingLLM(budget=1024)``. It must give what the stock cache gives, bit
    for bit, while nothing has to be forgotten; what it computes padded or in a batch must equal what it computes alone.
    The contract tests check every file of this folder.

    Class attributes `paper` and `cost` say where it is from and what it costs in plain words (``pondera methods``
    prints them).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests. ``"exact"``: nothing is evicted in 64 tokens; ``"tight"``: at most 8 of 12
    tokens are kept (a form named ``"-share"``: half of them). Further forms are pairs such as ``"exact-heads"``, ``"tight-heads"``."""

    saves: ClassVar[str] = "bytes"
    """What it makes less of: the ``"bytes"`` that are kept; or it keeps everything, and makes less of ``"reading"`` it in
    attention, or of ``"compute"`` in all of a layer; or of ``"nothing"``."""
    prunes_hidden_states: ClassVar[bool] = False
    """It drops tokens from the hidden states between layers."""
    fitted: bool = True
    """False where `fit` has to come first."""

    @property
    def needs_rows_of_config(self) -> bool:
        """Its layers are made for as many KV heads, as wide, as the model's configuration says."""
        return False

    def bind(self, config: PreTrainedConfig) -> None:  # noqa: B027 (optional: for those that have weights)
        """Creates what depends on the model, such as empty codebooks, so that a checkpoint can be loaded into it.

        Args:
            config: text config of the model.
        """

    @abstractmethod
    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVLayer:
        """An empty layer.

        Args:
            config: text config of the model.
            index: of the layer among the compressed ones.
            among: how many are compressed.
        """

    def fit(self, model: PreTrainedModel, samples: Iterable[Tensor]) -> Self:
        """Learns what it needs to know of a model, from text; nothing, for most.

        Args:
            model: whose past is to be kept.
            samples: token ids, ``[B, T]`` each.
        """
        return self

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:  # noqa: B027 (optional)
        """Refuses a model that it does not fit.

        Args:
            config: text config of the model.
            layers: numbers of the layers to be compressed.
        """

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:  # noqa: B027 (optional)
        """Is shown the model and the layers of a new cache together, before anything is read.

        Args:
            model: that the cache is for.
            cache: empty.
        """

    def cache(self, model: PreTrainedModel) -> KVCache:
        """An empty cache for this model, whose attention modules look for it from now on.

        The first time, a few tokens are read and held against the stock cache. With any other cache the model behaves
        as it did before.

        Args:
            model: any causal LM of transformers.

        Raises:
            UserError: nothing in this model can be compressed, `fit` has to come first, or caches of Pondera cannot be
                right for it.
        """
        if not self.fitted:
            raise UserError(
                f"{type(self).__name__} has not been fitted to a model yet: method.fit(model, samples), or from the command "
                "line: pondera compress MODEL --kv-cache ... --calibrate TEXT"
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
            said = (kv_heads(config), head_dim(config), head_dim(config))
            if other := next((rows for rows in verdict.rows if rows != said), None):
                raise UserError(
                    f"{type(self).__name__}: {name(model)} is not supported: its configuration says {said[0]} KV heads of "
                    f"width {said[1]}, and {other[0]} with keys of {other[1]} and values of {other[2]} reach attention; use "
                    "PreallocatedCache() or an eviction method with one budget for all heads, such as H2O(256)"
                )
        cache = KVCache(layers, self, owner)
        self.prepare(model, cache)
        return cache

    def __getattr__(self, name: str) -> Any:
        if name in _OF_CACHES:
            raise NoCache(
                f"past_key_values: {self!r} is a method, and what is wanted is a cache of it; pass {self!r}.cache(model)"
            )
        return super().__getattr__(name)

    def slot_cache(self, model: PreTrainedModel, windowed: list[bool], slots_per_token: int) -> CompressedSlotCache:
        """An empty cache for a method that runs several passes per token on this model, in layers of this method.

        Args:
            model: any causal LM of transformers.
            windowed: which decoder layers have a sliding window; their slots are all kept, and masked.
            slots_per_token: the most slots that a token can have.

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
        """An empty cache for a method whose slots of a token are consecutive, in layers of this method.

        Args:
            model: any causal LM of transformers.
            slots_per_token: slots that each token leaves in every layer.

        Raises:
            UserError: see `slot_cache`.
        """
        if slots_per_token > 1:
            self.check_passes()
        view = self.cache(model)
        return TokenCache(view.layers, slots_per_token, view)

    def check_passes(self) -> None:
        """Refuses to keep several slots per token where that cannot be right.

        Raises:
            UserError: why.
        """
        if self.prunes_hidden_states:
            raise UserError(
                f"{type(self).__name__} drops tokens from the hidden states between layers, and a method that thinks feeds the "
                "final state of every token back; use a method that works on the cache alone, such as SnapKV(1024)"
            )

    def load_cache(self, model: PreTrainedModel, path: str | Path) -> KVCache:
        """A cache that `KVCache.save` has written, on the model's device; `generate` goes on as if it had never left.

        Args:
            model: the one that it was read with.
            path: the file.

        Raises:
            UserError: no such file, or another memory's or model's.
        """
        cache = self.cache(model)
        load(cache.layers, repr(self), path)
        return cache


def compressible(config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers whose past grows without end; windows and recurrent states stay as they are.

    Raises:
        UserError: there is none.
    """
    kinds = layer_kinds(config)
    chosen = [number for number, kind in enumerate(kinds) if kind == FULL]
    others = sorted(set(kinds) - {FULL})
    if not chosen:
        raise UserError(
            f"{config.model_type}: all its layers are {' or '.join(others)}, and Pondera compresses full attention; there is "
            "nothing to compress, use the model as it is, with its stock cache"
        )
    if others:
        log.info("%d of %d layers are compressed; %s stay as they are", len(chosen), len(kinds), " and ".join(others))
    return chosen

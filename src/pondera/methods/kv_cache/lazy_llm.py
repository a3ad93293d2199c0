"""LazyLLM: in every call deeper layers run the tokens that matter to it, and the others wait where they stopped.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
from torch import Tensor

from pondera.arch.families import listed, modules
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.policy import highest
from pondera.methods.kv_cache.common.token_pruning import MIN_TOKENS, PrunedLayer, Selector, link
from pondera.methods.kv_cache.common.token_pruning_hooks import pack
from pondera.methods.kv_cache.common.token_revival import ProgressivePruning, RevivalLayer


class LazyLLM(ProgressivePruning):
    """Behind some layers, only the tokens go on that the last token looks at most; others may be taken up again later.

    In each call, of the prompt and of every step, all tokens are there at the first layer. At a layer that prunes, they
    are ranked by the last token's attention, the mean over heads, and a share goes on. A token that goes on without
    ever having been through the next layers is run through them now, from the hidden state with which it stopped; a
    token that does not go on leaves its state behind. So what is pruned may differ from call to call, and each token is
    run through each layer once at most.

    Source: Fu et al., LazyLLM, arXiv 2407.14057, whose code is not public.
    Cost: layers behind those that prune run a part of the prompt, and later what is taken up. The cache holds a hidden
    state and its rotary rows for each token that has stopped, beside the keys and values of what was run: it saves
    compute. In a batch every text runs as many rows as the one that takes up most.
    When not to use it: to save memory. Where logits of a prompt's tokens are wanted: of those that stop there are none.
    On models with windows, recurrent states, or of architectures other than those of `pondera.arch.families` with
    rotary positions: they are refused, as nothing could be taken up again.
    Resolved: the paper gives neither the layers nor the percentiles; the defaults are ours. A share is of the tokens
    that have come as far as the layer, rounded down, of equals the newer. Up to 8 new tokens of a call go on in any
    case, of longer calls the last one. Queries look at what goes on in this call, and at nothing else that a layer
    holds from earlier ones. Keys and values of a token are those of the call in which it was first run, and are not
    computed anew. While tokens may be drafts, they all go on, and of the others those that went on in the call before:
    a draft that is taken back must not have had a say.

    Args:
        keep_ratio: share of the tokens that goes on at each layer that prunes, of those that have come so far; a list
            has one for each. 1 is the stock model.
        layers: those that prune, by their numbers from 0; none: at a quarter, half, and three quarters of the depth.

    Example:
        >>> LazyLLM(keep_ratio=[0.8, 0.5], layers=[10, 20]).keep_ratio
        [0.8, 0.5]
    """

    paper: ClassVar[str] = "LazyLLM, arXiv 2407.14057"
    prunes_hidden_states = True
    cost: ClassVar[str] = (
        "deeper layers run a part of the tokens; a hidden state for each that stopped, beside the rows of what was run"
    )
    examples: ClassVar[dict[str, str]] = {"exact": "LazyLLM(1.0)", "tight": "LazyLLM([0.7, 0.5], layers=[0, 1])"}
    saves: ClassVar[str] = "compute"

    def __init__(self, keep_ratio: float | list[float] = 0.6, layers: list[int] | None = None) -> None:
        super().__init__()
        for share in keep_ratio if isinstance(keep_ratio, list) else [keep_ratio]:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise UserError(
                    f"keep_ratio={keep_ratio!r}: give the share that goes on, above 0 and at most 1, e.g. 0.6"
                )
        if layers is not None and (
            not isinstance(layers, list)
            or not layers
            or not all(type(number) is int and number >= 0 for number in layers)
            or sorted(set(layers)) != layers
        ):
            raise UserError(f"layers={layers!r}: give the numbers of layers from 0, in rising order, e.g. [8, 16, 24]")
        self.keep_ratio, self.layers = keep_ratio, layers

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        depth = config.num_hidden_layers
        parts = modules(config)
        if parts is None or not parts.layers_skip_tokens:
            raise UserError(
                f"LazyLLM: layers of {config.model_type} cannot be given tokens again that stopped; those that can are "
                f"{listed(lambda each: each.modules and each.modules.layers_skip_tokens)}. "
                "TokenSelect keeps everything too, and needs no such layers"
            )
        if len(layers) < depth:
            raise UserError(
                f"LazyLLM: {depth - len(layers)} of the {depth} layers of this {config.model_type} have windows or recurrent "
                "states, in which a token cannot be taken up again; use TokenSelect, which keeps everything too"
            )
        shares, numbers = self.shares(depth), self.at(depth)
        if isinstance(self.keep_ratio, list) and len(self.keep_ratio) != len(numbers):
            raise UserError(
                f"keep_ratio={self.keep_ratio}: {len(numbers)} layers prune, {numbers}; give a share for each"
            )
        if shares and max(shares) > depth - 2:
            raise UserError(
                f"layers={self.layers}: give numbers from 0 to {depth - 2}; behind the last of {depth} is none"
            )

    def at(self, depth: int) -> list[int]:
        """The layers that prune, of so many."""
        if self.layers is not None:
            return self.layers
        return sorted({max(0, depth * part // 4 - 1) for part in (1, 2, 3) if depth > 1})

    def shares(self, depth: int) -> dict[int, float]:
        """What goes on at each of them."""
        numbers = self.at(depth)
        return dict(
            zip(
                numbers,
                self.keep_ratio if isinstance(self.keep_ratio, list) else [self.keep_ratio] * len(numbers),
                strict=False,
            )
        )

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`."""
        return (RevivalLayer if index in self.shares(among) else PrunedLayer)(self, index, among)

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        link(cache)
        pack(model, cache)

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """See `Policy.observed_queries`."""
        return 1 if isinstance(layer, RevivalLayer) and not layer.record_past else 0

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: what the last token looks at; ``-inf`` where it may not look."""
        weight_BS = seen.weight_BGRTS[:, :, :, -1].mean((1, 2))
        cast(RevivalLayer, layer).score_BS = weight_BS.masked_fill(
            seen.score_BGRTS[:, 0, 0, -1] == -math.inf, -math.inf
        )

    def choose(self, layer: RevivalLayer, came: Selector) -> Tensor | None:
        """See `ProgressivePruning.choose`."""
        position_BS, score_BS = layer.tables[0].position[:, 0], layer.score_BS
        layer.score_BS = None
        assert score_BS is not None
        there_BS = score_BS > -math.inf
        few_B = came.tokens - came.padding_B <= MIN_TOKENS
        always_BS = there_BS & (position_BS >= torch.where(few_B, came.begin, layer.seen - 1)[:, None])
        share = self.shares(layer.among)[layer.index]
        there_B = there_BS.sum(-1)
        count_B = (there_B.double() * share).long().maximum(always_BS.sum(-1))
        if layer.led is None and bool((count_B == there_B).all()) and not bool((layer.waiting >= 0).any()):
            return None
        score_BS = score_BS.masked_fill(always_BS, math.inf)
        slot_B1k, kept_B1k = highest(score_BS[:, None], position_BS[:, None], count_B[:, None])
        return torch.zeros_like(there_BS).scatter(1, slot_B1k[:, 0], kept_B1k[:, 0])

"""LazyLLM: progressive token pruning per step; pruned hidden states stay in an auxiliary cache and can be revived.

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
    """Progressive token pruning in prefill and decoding; an auxiliary cache allows later steps to revive tokens.

    Each call (prefill and every decode step) starts with all tokens at the first layer. A pruning layer ranks the
    tokens by the last token's attention, averaged over heads, and a share of them continues. The layer stores the
    hidden state of a pruned token in its auxiliary cache. If a later call selects a token that later layers have not
    computed yet, they compute it from this hidden state. So each call can prune other tokens, and each layer computes
    each token at most once.

    Source: Fu et al., LazyLLM, arXiv 2407.14057, whose code is not public.
    Cost: layers after the pruning layers run a part of the prompt, and revived tokens later. The cache keeps a hidden
    state and its rotary embedding for each pruned token, in addition to keys and values: the method saves compute. In a
    batch every sequence runs as many tokens as the one that revives most.
    When not to use it: to save memory. If you need logits of prompt tokens: pruned tokens have none. On models with
    sliding windows, recurrent states or architectures outside of `pondera.arch.families` with rotary positions: the
    method refuses them, as it could not revive tokens there.
    Resolved: the paper gives neither the layers nor the percentiles; the defaults are ours. A share refers to the
    tokens that have reached the layer, rounded down; among equal scores the newer token continues. A call of up to 8
    new tokens prunes none of them; a longer call always keeps its last token. Queries attend only to tokens that
    continue in the same call, not to other slots of earlier calls. A token keeps the keys and values of the call that
    computed it first. While tokens may be rolled back, all of them continue, and of the earlier tokens those of the
    previous call: draft tokens must not influence the selection.

    Args:
        keep_ratio: share of the tokens that continue at each pruning layer, of those that reached it; a list has one
            per pruning layer. 1 is the stock model.
        layers: indices of the pruning layers, from 0; default: `None`, after a quarter, half, and three quarters of the
            depth.

    Example:
        >>> LazyLLM(keep_ratio=[0.8, 0.5], layers=[10, 20]).keep_ratio
        [0.8, 0.5]
    """

    paper: ClassVar[str] = "LazyLLM, arXiv 2407.14057"
    prunes_hidden_states = True
    cost: ClassVar[str] = (
        "deeper layers run a part of the tokens; a hidden state per pruned token, in addition to keys and values"
    )
    examples: ClassVar[dict[str, str]] = {"exact": "LazyLLM(1.0)", "tight": "LazyLLM([0.7, 0.5], layers=[0, 1])"}
    saves: ClassVar[str] = "compute"

    def __init__(self, keep_ratio: float | list[float] = 0.6, layers: list[int] | None = None) -> None:
        super().__init__()
        for share in keep_ratio if isinstance(keep_ratio, list) else [keep_ratio]:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise UserError(
                    f"keep_ratio={keep_ratio!r}: give the share of tokens to keep, above 0 and at most 1, e.g. 0.6"
                )
        if layers is not None and (
            not isinstance(layers, list)
            or not layers
            or not all(type(number) is int and number >= 0 for number in layers)
            or sorted(set(layers)) != layers
        ):
            raise UserError(f"layers={layers!r}: give layer indices from 0, in rising order, e.g. [8, 16, 24]")
        self.keep_ratio, self.layers = keep_ratio, layers

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        depth = config.num_hidden_layers
        parts = modules(config)
        if parts is None or not parts.layers_skip_tokens:
            raise UserError(
                f"LazyLLM: {config.model_type} cannot revive pruned tokens; supported are "
                f"{listed(lambda each: each.modules and each.modules.layers_skip_tokens)}. "
                "TokenSelect also keeps all tokens, and works without revival"
            )
        if len(layers) < depth:
            raise UserError(
                f"LazyLLM: {depth - len(layers)} of the {depth} layers of this {config.model_type} have windows or "
                "recurrent states, which cannot revive a token; use TokenSelect, which also keeps all tokens"
            )
        shares, numbers = self.shares(depth), self.at(depth)
        if isinstance(self.keep_ratio, list) and len(self.keep_ratio) != len(numbers):
            raise UserError(
                f"keep_ratio={self.keep_ratio}: {len(numbers)} layers prune, {numbers}; give one share per layer"
            )
        if shares and max(shares) > depth - 2:
            raise UserError(
                f"layers={self.layers}: give numbers from 0 to {depth - 2}; no layer follows the last of {depth}"
            )

    def at(self, depth: int) -> list[int]:
        """Indices of the pruning layers, for a model with `depth` layers."""
        if self.layers is not None:
            return self.layers
        return sorted({max(0, depth * part // 4 - 1) for part in (1, 2, 3) if depth > 1})

    def shares(self, depth: int) -> dict[int, float]:
        """The share of tokens that continue, by pruning layer."""
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
        """See `Policy.observe`: the attention of the last token; ``-inf`` for masked slots."""
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

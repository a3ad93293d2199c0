"""FastKV: from layer `tsp_layer` on, prefill propagates only the most attended tokens.

Shapes: B batch, G KV heads, T new tokens, S slots, k kept tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import EMPTY
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.budget import SlotBudget
from pondera.methods.kv_cache.common.policy import Policy, highest
from pondera.methods.kv_cache.common.token_pruning import MIN_TOKENS, PrunedLayer, Selector, SelectorLayer, link
from pondera.methods.kv_cache.common.token_pruning_hooks import pack
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.snap_kv import SnapKV


class FastKV(PolicyWrapper):
    """Token-selective propagation: after one layer, prefill continues only with the most attended prompt tokens.

    The method wraps `SnapKV` and has two independent budgets: the KV slots per layer (that of the policy), and the
    prompt tokens that later layers compute (`tsp`). Up to the selecting layer, prefill runs the whole prompt. This
    layer sums the attention weights of the policy's observation window over all heads; the highest-scoring tokens and
    the window continue, with their positions, and later layers see no other tokens. Then every layer evicts as the
    policy does.

    Source: Jo et al., FastKV, arXiv 2502.01068.
    Cost: in prefill, later layers run `tsp` tokens instead of all; decoding costs as much as with the policy. This
    requires an architecture of `pondera.arch.families` whose layers receive their cache by name (not GPT-2), with all
    later layers compressed; in other models later layers only save the attention of the other tokens.
    When not to use it: if you need logits or hidden states of prompt tokens before the window: for pruned tokens they
    are zeros or missing. For chunked prefill with up to 8 tokens per chunk, which prunes nothing. On models with
    sliding-window layers: those still see all tokens.
    Resolved: as in the authors' code, `tsp` includes the window, and later layers have the same budget as the others,
    so shares are shares of the whole prompt; later layers can only keep tokens that reached them. The authors' code
    prunes nothing if a prompt fits the policy's budget; here the budgets are independent. The sinks of the policy are
    never pruned. In chunked prefill each chunk selects among its own tokens; KV slots of earlier chunks stay visible.
    While tokens may be rolled back, the method prunes no tokens, and only the policy evicts: draft tokens must not
    influence the selection.

    Args:
        policy: `SnapKV`, or a wrapper around it; default: `None`, as in the authors' code a budget of a tenth of the
            prompt, a window of 8, and mean pooling over 7 tokens.
        tsp: number of tokens that continue, including the window, or their share of the prompt.
        tsp_layer: index of the selecting layer among the compressed ones; default: `None`, the middle one, as in the
            paper (of 32 layers the sixteenth). The last layer prunes nothing: the policy alone.

    Example:
        >>> FastKV(SnapKV(512, window=8, pool="mean"), tsp=2048, tsp_layer=15).observation_window
        8
    """

    paper: ClassVar[str] = "FastKV, arXiv 2502.01068"
    prunes_hidden_states = True
    cost: ClassVar[str] = "the policy's KV slots; later layers compute a part of the prompt"
    examples: ClassVar[dict[str, str]] = {
        "exact": "FastKV(SnapKV(64, window=4), tsp=64)",
        "tight": "FastKV(SnapKV(6, window=3, kernel=3, pool='mean'), tsp=0.8, tsp_layer=0)",
        "exact-adaptive": "FastKV(AdaKV(SnapKV(64, window=4)), tsp=64)",
        "tight-adaptive": "FastKV(AdaKV(SnapKV(6, window=3, kernel=3), safeguard=0.3), tsp=8)",
    }
    packed: bool = True
    """Whether decoder layers skip pruned tokens; if false, they run them and only cache layers drop them."""

    def __init__(
        self, policy: KVCacheMethod | None = None, tsp: int | float = 0.2, tsp_layer: int | None = None
    ) -> None:
        policy = SnapKV(0.1, window=8, kernel=7, pool="mean") if policy is None else policy
        innermost = policy
        while isinstance(innermost, PolicyWrapper) and not isinstance(innermost, FastKV):
            innermost = innermost.policy
        if not isinstance(policy, Policy) or not isinstance(innermost, SnapKV):
            raise UserError(
                f"FastKV({type(policy).__name__}(...)): give SnapKV or a wrapper around it, "
                "e.g. FastKV(SnapKV(512, window=8))"
            )
        super().__init__(policy)
        least = max(MIN_TOKENS, innermost.observation_window + innermost.sinks)
        if (
            isinstance(tsp, bool)
            or not isinstance(tsp, int | float)
            or (isinstance(tsp, float) and not 0 < tsp <= 1)
            or (isinstance(tsp, int) and tsp < least)
        ):
            raise UserError(
                f"tsp={tsp!r}: give the tokens that continue as a number ({max(2048, least)}; at least {least}, for "
                f"the window and sinks of the policy, or {MIN_TOKENS}) or as a share of the prompt (0.2; above 0, at "
                "most 1)"
            )
        if tsp_layer is not None and (isinstance(tsp_layer, bool) or not isinstance(tsp_layer, int) or tsp_layer < 0):
            raise UserError(
                f"tsp_layer={tsp_layer!r}: give the index of a layer, 0 or more, or None for the middle one"
            )
        self.innermost, self.tsp_layer = innermost, tsp_layer
        self.tsp = SlotBudget(tsp, least)

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        super().check(config, layers)
        if self.tsp_layer is not None and self.tsp_layer >= len(layers):
            raise UserError(
                f"tsp_layer={self.tsp_layer}: {len(layers)} layers of this model are compressed; give a number from 0 "
                f"to {len(layers) - 1}, or omit tsp_layer for the middle one"
            )

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> KVStoreLayer:
        """See `KVCacheMethod.layer`."""
        chooser = (among - 1) // 2 if self.tsp_layer is None else self.tsp_layer
        if index < chooser or chooser == among - 1:
            return KVStoreLayer(self, index, among)
        return (SelectorLayer if index == chooser else PrunedLayer)(self, index, among)

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        super().prepare(model, cache)
        link(cache)
        if self.packed:
            pack(model, cache)

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """See `Policy.evict_layer`: selects the tokens that continue before the policy evicts."""
        if isinstance(layer, SelectorLayer) and layer.new_BT is not None and layer.at_prompt:
            layer.choice = self.choose(layer, layer.new_BT)
        super().evict_layer(layer)

    def choose(self, layer: SelectorLayer, new_BT: Tensor) -> Selector | None:
        """Selects the tokens of a call that continue; `None`: all of them.

        Args:
            layer: the selecting layer.
            new_BT: positions of the call's tokens; negative for padding.
        """
        real_BT, T = new_BT >= 0, new_BT.shape[1]
        tokens = real_BT.sum(-1).tolist()
        count = [min(real, self.tsp.slots(0, [0], real, 1, 1)[0]) for real in tokens]
        if count == tokens:
            return None
        begin, among = layer.seen - T, self.innermost
        score_BT = torch.zeros(new_BT.shape, device=new_BT.device)
        for table in layer.tables:
            place_BGS = table.position.long() - begin
            protected_score_BGS = among.score(layer, table).masked_fill(place_BGS < 0, 0)
            score_BT.scatter_add_(1, place_BGS.clamp(min=0).flatten(1), protected_score_BGS.flatten(1).float())
        first_B1 = (layer.state["padding"] + among.sinks)[:, None]
        always_BT = (new_BT >= layer.seen - among.observation_window) | (new_BT < first_B1)
        score_BT = score_BT.masked_fill(always_BT, torch.inf).masked_fill(~real_BT, -torch.inf)
        count_B1 = torch.tensor(count, device=new_BT.device)[:, None]
        place_B1k, kept_B1k = highest(score_BT[:, None], new_BT[:, None], count_B1)
        position_Bk = new_BT.gather(1, place_B1k[:, 0]).masked_fill(~kept_B1k[:, 0], EMPTY).sort(-1).values
        return Selector(position_Bk, begin, T, (~real_BT).sum(-1), layer.packs)

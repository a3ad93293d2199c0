"""FastKV: from one layer on, a prompt's tokens that nobody looks at are not even read.

Shapes: B batch, G KV heads, T new tokens, S slots, k tokens that go on.
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
    """Around `SnapKV`: behind one layer, only the tokens of the prompt that it looks at most go on.

    Two budgets are apart: how many rows of the cache each layer keeps, which is the policy's, and how many tokens of
    the prompt the later layers work on. Up to the layer that chooses, the whole prompt goes through. There the weights
    that the policy's window gave are added up over all heads, and the tokens with the largest go on beside the window,
    with their positions; for all later layers there is nothing else. Every layer then cuts what it has seen, as the
    policy does.

    Source: Jo et al., FastKV, arXiv 2502.01068.
    Cost: in the prompt, later layers run `tsp` tokens instead of all; decoding is as the policy's. That holds for the
    architectures of `pondera.arch.families` whose layers are given their cache by name (not GPT-2), where every later
    layer is compressed; in other models later layers are spared the attention of the other tokens, and nothing else.
    When not to use it: where the logits or hidden states of a prompt's tokens are wanted: those of the window count,
    and of tokens that did not go on they mean nothing, or are not there. For prompts in pieces of up to 8 tokens, which
    go on whole. Beside sliding layers, which still see everything.
    Resolved: as in the authors' code `tsp` counts the window, and the later layers keep as many rows as the others, so
    shares are of the whole prompt; what went on is all there is to keep. Their code lets everything go on where a
    prompt is within the policy's budget; here the budgets are independent. Sinks of the policy go on. A prompt in
    pieces is chosen from in each piece, by this piece's tokens; what earlier pieces left in a layer stays visible.
    While tokens may be drafts all go on, and only the policy forgets: a draft that is taken back must not have had a
    say.

    Args:
        policy: `SnapKV`, or a wrapper around it; none: as in the authors' code, a tenth of the prompt, a window of 8,
            and the mean of 7 neighbours.
        tsp: tokens that go on, a number or a share of the prompt, the window counted.
        tsp_layer: the layer that chooses, counted from 0 among those that are compressed; none: the middle one, of 32
            layers the sixteenth, as in the paper. At the last layer it is the policy alone.

    Example:
        >>> FastKV(SnapKV(512, window=8, pool="mean"), tsp=2048, tsp_layer=15).observation_window
        8
    """

    paper: ClassVar[str] = "FastKV, arXiv 2502.01068"
    prunes_hidden_states = True
    cost: ClassVar[str] = "the policy's rows; later layers read a part of the prompt's tokens"
    examples: ClassVar[dict[str, str]] = {
        "exact": "FastKV(SnapKV(64, window=4), tsp=64)",
        "tight": "FastKV(SnapKV(6, window=3, kernel=3, pool='mean'), tsp=0.8, tsp_layer=0)",
        "exact-adaptive": "FastKV(AdaKV(SnapKV(64, window=4)), tsp=64)",
        "tight-adaptive": "FastKV(AdaKV(SnapKV(6, window=3, kernel=3), safeguard=0.3), tsp=8)",
    }
    packed: bool = True
    """Decoder layers leave out what does not go on; false: they run it, and only the layers of the cache leave it out."""

    def __init__(
        self, policy: KVCacheMethod | None = None, tsp: int | float = 0.2, tsp_layer: int | None = None
    ) -> None:
        policy = SnapKV(0.1, window=8, kernel=7, pool="mean") if policy is None else policy
        innermost = policy
        while isinstance(innermost, PolicyWrapper) and not isinstance(innermost, FastKV):
            innermost = innermost.policy
        if not isinstance(policy, Policy) or not isinstance(innermost, SnapKV):
            raise UserError(
                f"FastKV({type(policy).__name__}(...)): give SnapKV or a wrapper around it, e.g. FastKV(SnapKV(512, window=8))"
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
                f"tsp={tsp!r}: give the tokens that go on as a number ({max(2048, least)}; at least {least}, for "
                f"the policy's window and sinks, or {MIN_TOKENS}) or as a share of the prompt (0.2; above 0 and at most 1)"
            )
        if tsp_layer is not None and (isinstance(tsp_layer, bool) or not isinstance(tsp_layer, int) or tsp_layer < 0):
            raise UserError(
                f"tsp_layer={tsp_layer!r}: give the number of a layer, 0 or more, or none for the middle one"
            )
        self.innermost, self.tsp_layer = innermost, tsp_layer
        self.tsp = SlotBudget(tsp, least)

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        super().check(config, layers)
        if self.tsp_layer is not None and self.tsp_layer >= len(layers):
            raise UserError(
                f"tsp_layer={self.tsp_layer}: {len(layers)} layers of this model are compressed; give a number from 0 to "
                f"{len(layers) - 1}, or leave it out for the middle one"
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

    def evict_layer(self, layer: KVStoreLayer) -> bool:
        """See `Policy.evict_layer`: before the policy forgets, the tokens that go on are chosen by what it has noted."""
        if isinstance(layer, SelectorLayer) and layer.new_BT is not None and layer.at_prompt:
            layer.choice = self.choose(layer, layer.new_BT)
        return super().evict_layer(layer)

    def choose(self, layer: SelectorLayer, new_BT: Tensor) -> Selector | None:
        """The tokens of a call that go on; none: all of them.

        Args:
            layer: that chooses.
            new_BT: positions of the call's tokens; negative where they are padding.
        """
        real_BT, T = new_BT >= 0, new_BT.shape[1]
        tokens = real_BT.sum(-1).tolist()
        count = [min(real, self.tsp.slots(0, [0], real, 1, 1)[0]) for real in tokens]
        if count == tokens:
            return None
        begin, among = layer.seen - T, self.innermost
        score_BT = torch.zeros(new_BT.shape, device=new_BT.device)
        for _, table in layer.parts():
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

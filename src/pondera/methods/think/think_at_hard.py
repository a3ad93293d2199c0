"""Think-at-Hard: a second pass for the tokens whose prediction after the first is likely to be wrong.

Shapes: B batch, T tokens, D width, W width of the decider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting
from pondera.methods.think.common.passes import Passes, all_shallower_passes
from pondera.models.backbone import Backbone


class ThinkAtHard(Think):
    """Tokens that a decider finds hard are read again, as the mixture of tokens that the model predicts so far.

    The mixture of input embeddings by the likeliest predictions replaces the token's embedding; depth k of a token
    attends to depths 0..k of all tokens up to it, so no pass waits for a thought of another token. The logits of a
    token's passes add up. In training no decision is asked of the decider: a token is hard if the prediction so far is
    wrong, and goes on. The decider learns at the same time to tell so from the state alone, by cross-entropy on
    features without gradient (the term ``decider``); at inference, where nobody knows what follows, it decides.

    Source: Think-at-Hard, arXiv 2511.08577, and the authors' public code.
    Cost: 1 + (share of hard tokens) passes and KV rows per token, in training (``shares`` there are those of wrong
    predictions) as at inference; the head once more per further pass, for the mixture; the decider on every token; in
    training also the head's predictions, without gradient.
    When not to use it: from scratch for long, as a model that is wrong at most tokens sends most of them on; on decoders
    with linear-attention layers, whose state follows storage order, and on heads with a bias or a cap on their logits,
    whose sum is not the head of summed states (both refused by name); with gradient checkpointing.
    Resolved: the head is linear, so logits are added up as states, and what is read out is the sum of a token's states.
    The decider learns along with the model, where the authors train it afterwards, against a frozen one; for that,
    train with ``halting="oracle"``, then the result with ``halting="decider"`` and ``train.freeze_backbone_steps`` for all steps.
    What is wrong is deferred by the model itself as it learns, not by a reference model. With several steps one decider
    stands before each; whoever stopped stays. Left out: adapters (LoRA) in further passes, so that all share all
    weights; of the decider's features the states of middle layers and the likeliest logits, which would take the head
    for every token; its dropout. Its width is a quarter of the model's and its blocks are two (the paper: 512 of 1024 or
    2048, six), about a tenth of a layer; its activation is not known, GELU here. Where no labelled token of a training
    batch is hard, its first one thinks all the same, to keep gradients alive. A smaller `effort` turns the threshold
    into threshold ** effort.

    Args:
        steps: further passes at most; 0 is the backbone itself.
        threshold: the probability of being hard from which the decider sends a token on. With `positive_weight` w it
            stands for odds w times lower: 0.8 at 5.4 is a probability of 0.43.
        top_k: how many of the likeliest tokens the mixture is made of.
        halting: ``"decider"`` (the paper), ``"fixed"`` (every token goes on), or a control: ``"random"``, ``"oracle"``
            (`pondera.methods.think.common.halting`).
        decider_width: W; none: a quarter of the model's.
        decider_layers: residual blocks.
        positive_weight: how many easy tokens a hard one weighs in the decider's loss.
        continue_prob: ``"random"``: the share of tokens that take each further pass.

    Example:
        >>> ThinkAtHard(steps=1).slots(tokens=8, shares=[1, 0.25])
        10.0
    """

    paper: ClassVar[str] = "Think-at-Hard, arXiv 2511.08577"
    cost: ClassVar[str] = "1 + share of hard tokens passes and KV rows per token, decider, head per mixture"
    examples: ClassVar[dict[str, str]] = {
        "exact": "ThinkAtHard(steps=2, threshold=0.5, top_k=8)",
        "identity": "ThinkAtHard(steps=0)",
    }
    drops_window_rows: ClassVar[bool] = False
    supports_recompute: ClassVar[bool] = False

    def __init__(
        self,
        steps: int = 1,
        threshold: float = 0.8,
        top_k: int = 100,
        halting: str = "decider",
        decider_width: int | None = None,
        decider_layers: int = 2,
        positive_weight: float = 5.4,
        continue_prob: float = 0.5,
    ) -> None:
        super().__init__()
        if steps < 0:
            raise UserError(f"steps={steps}: give 0 (no thinking) or more")
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: give a probability between 0 and 1")
        if decider_width is not None and decider_width < 1:
            raise UserError(
                f"decider_width={decider_width}: give 1 or more, or None for a quarter of the model's width"
            )
        if decider_layers < 0:
            raise UserError(f"decider_layers={decider_layers}: give 0 or more")
        if positive_weight <= 0:
            raise UserError(f"positive_weight={positive_weight}: give more than 0; 1 weighs hard and easy tokens alike")
        self.steps, self.threshold, self.positive_weight = steps, threshold, positive_weight
        self.decider_width, self.decider_layers = decider_width, decider_layers
        self.slots_per_token = steps + 1
        self.feedback = Feedback("vocab", top_k)
        self.halting = Halting(halting, "decider", continue_prob)
        self.adaptive = self.halting.adaptive and steps > 0

    def bind(self, backbone: Backbone) -> None:
        """Refuses backbones that cannot follow the mask or whose logits do not add up; creates the decider."""
        if not self.steps:
            return
        if why := _misfit(backbone):
            raise UserError(f"ThinkAtHard does not fit {backbone.config.model_type}: {why}")
        self.feedback.bind(backbone)
        if self.halting.learned:
            weight, width = next(backbone.parameters()), backbone.config.hidden_size
            inner = self.decider_width or max(1, width // 4)
            self.decider = Decider(width, inner, self.decider_layers).to(weight.device, weight.dtype)

    def begin_step(self, step: int, seed: int) -> None:
        """Lets a random control draw anew."""
        self.halting.draw = 1 + step

    def new_cache(self, backbone: Backbone) -> DepthCache:
        """One sub-cache per depth in every layer."""
        return DepthCache(backbone.config.num_hidden_layers, self.slots_per_token)

    def forward(
        self,
        backbone: Backbone,
        h_BTD: Tensor,
        position_ids: Tensor,
        cache: TokenCache | None = None,
        mask: Tensor | None = None,
        budget: Effort = FULL,
        labels_BT: Tensor | None = None,
    ) -> MethodOutput:
        """See `Think.forward`. Only in training do labels decide, and the decider is told how it would have done."""
        cache = cache if isinstance(cache, DepthCache) else self.new_cache(backbone)
        passes = Passes(backbone, position_ids, cache, mask, h_BTD.shape[1], "all_shallower", self.packed)
        state_BTD = total_BTD = passes.run_first(h_BTD)
        totals, lessons = [total_BTD], []
        for step in range(1, budget.passes(self.slots_per_token, self.halting.learned)):
            predict = partial(_likeliest, backbone, passes, total_BTD)
            if self.halting.learned:
                continue_BT, lesson = self._decide(passes, state_BTD, labels_BT, predict, budget)
                lessons += [lesson] if lesson is not None else []
            else:
                continue_BT = self.halting.continue_mask(step, position_ids, labels_BT, predict)
            if not passes.mask_active(continue_BT):
                break
            x_BTD = passes.of_active(partial(self.feedback, backbone), total_BTD)
            state_BTD = passes.run_pass(step, x_BTD, state_BTD)
            total_BTD = passes.where_active(total_BTD + state_BTD, total_BTD)
            totals.append(total_BTD)
        passes.finish()
        terms = {}
        if lessons:
            losses, counts = zip(*lessons, strict=True)
            terms = {"decider": LossTerm(torch.stack(losses).sum(), torch.stack(counts).sum())}
        return MethodOutput(total_BTD, passes.passes_BT, terms, trace={"states": totals} if self.record else {})

    def _decide(
        self,
        passes: Passes,
        state_BTD: Tensor,
        labels_BT: Tensor | None,
        predict: Callable[[], Tensor],
        budget: Effort,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Who goes on; and, where labels are there to learn from, the decider's summed loss and what it was summed over."""
        logit_BT = passes.of_active(self.decider, state_BTD.detach())[..., 0].float()
        if not self.training or labels_BT is None:
            return logit_BT.sigmoid() >= budget.threshold(self.threshold), None
        known_BT = passes.real(passes.where_active(labels_BT >= 0, False))
        hard_BT = known_BT & (predict() != labels_BT)
        loss = F.binary_cross_entropy_with_logits(
            logit_BT[known_BT],
            hard_BT[known_BT].float(),
            reduction="sum",
            pos_weight=logit_BT.new_tensor(self.positive_weight),
        )
        first_BT = known_BT & (known_BT.flatten().cumsum(0).view_as(known_BT) == 1)
        return hard_BT | (first_BT & ~hard_BT.any()), (loss, known_BT.sum())

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """See `Think.slots`: passes that were not taken leave nothing."""
        return tokens * (sum(shares) if shares else self.slots_per_token)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. Rows are masked, never dropped, so no call is shortened by a sliding window."""
        shares = shares or [1] * self.slots_per_token
        deferred, thinking = tokens * sum(shares[:-1]), tokens * sum(shares[1:])
        made: list[DecoderPass | MatMul] = [*self.feedback.cost_schedule(thinking)]
        if self.halting.learned and self.steps:
            made.append(MatMul(deferred, sum(p.numel() for p in self.decider.parameters() if p.ndim == 2)))
            if training:  # the predictions that say which tokens are hard
                made.append(MatMul(deferred, "head", trained=False))
        return [*made, *all_shallower_passes(tokens, context, shares)]


class Decider(nn.Module):
    """Says of a state how likely its token is hard: residual MLPs, each behind a LayerNorm.

    Args:
        width: D, of the states.
        inner: W.
        layers: residual blocks, with four times W inside.

    Example:
        >>> Decider(width=64, inner=16, layers=2)(torch.zeros(1, 5, 64)).shape
        torch.Size([1, 5, 1])
    """

    def __init__(self, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, inner)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 4 * inner), nn.GELU(), nn.Linear(4 * inner, inner))
            for _ in range(layers)
        )
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 1))

    def forward(self, state_BTD: Tensor) -> Tensor:
        """Logits ``[B, T, 1]``."""
        x_BTW = self.enter(state_BTD)
        for block in self.blocks:
            x_BTW = x_BTW + block(x_BTW)
        return self.leave(x_BTW)


def _likeliest(backbone: Backbone, passes: Passes, total_BTD: Tensor) -> Tensor:
    """The next token ``[B, T]`` that the states summed so far predict."""

    @torch.no_grad()
    def best(state_BTD: Tensor) -> Tensor:
        return backbone.head(state_BTD).argmax(-1, keepdim=True)

    return passes.of_active(best, total_BTD)[..., 0]


def _misfit(backbone: Backbone) -> str:
    """Why a backbone cannot think this way; nothing where it can."""
    if "linear_attention" in backbone.layer_types:
        return (
            "its linear-attention layers read slots in storage order and cannot hide later depths; use "
            "PonderLM2(thoughts=1, feedback='vocab') on this backbone"
        )
    capped = getattr(backbone.config, "final_logit_softcapping", None) is not None
    if capped or getattr(backbone.lm.get_output_embeddings(), "bias", None) is not None:
        return (
            f"its head {'caps logits' if capped else 'has a bias'}, so logits of several passes do not add up as their "
            "states do; use AdaptiveLatentCoT(steps=1) on this backbone"
        )
    return ""

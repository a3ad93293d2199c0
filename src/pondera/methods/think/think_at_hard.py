"""Think-at-Hard: a second pass for tokens whose first prediction is likely to be wrong.

Shapes: B batch, T tokens, D width, W width of the decider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, TokenBatch
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting
from pondera.methods.think.common.halting_think import HaltingThink
from pondera.methods.think.common.passes import Attend, Passes, all_shallower_passes
from pondera.models.backbone import Backbone


class ThinkAtHard(HaltingThink):
    """Hard tokens, selected by a learned decider, get an extra pass on the embedding mixture of the current prediction.

    The mixture of the input embeddings of the most likely next tokens replaces the token's embedding. Depth k of a
    token attends to depths 0..k of all tokens up to it, so a pass never waits for a deeper pass of another token. The
    logits of a token's passes are summed. In training the decider makes no decisions: a token is hard, and continues,
    if the current prediction is wrong. At the same time the decider learns to predict this from the state alone, by
    cross-entropy on detached features (the term ``decider``). At inference, where the next token is unknown, the
    decider decides.

    Source: Think-at-Hard, arXiv 2511.08577, and the authors' public code.
    Cost: 1 + (share of hard tokens) passes and KV slots per token, in training (there ``shares`` are the shares of
    wrong predictions) and at inference; one more evaluation of the head per extra pass, for the mixture; the decider on
    every token; in training also the predictions of the head, without gradient.
    When not to use it: for long training from scratch, because a model that is wrong on most tokens continues with most
    of them; on decoders with linear-attention layers, whose state follows storage order, and on heads with a bias or
    logit soft-capping, where summed logits are not the head of summed states (both raise an error); with gradient
    checkpointing.
    Resolved: the head is linear, so the method sums states instead of logits and applies the head to the sum. The
    decider trains together with the model; the authors train it afterwards against a frozen model. To do that, train
    with ``halting="oracle"``, then continue with ``halting="decider"`` and ``train.freeze_backbone_steps`` for all
    steps. The trained model itself labels predictions as wrong, not a reference model. With several steps one decider,
    shared by all steps, decides before each; a halted token stays halted. Left out: adapters (LoRA) in the extra
    passes, so all passes share all weights; the decider's features from middle layers and from the most likely logits,
    which need the head for every token; the decider's dropout. The decider has a quarter of the model's width and two
    blocks (the paper: 512 of 1024 or 2048, six blocks), about a tenth of a layer. Its activation is not published; here
    it is GELU. If no labeled token of a training batch is hard, the first one continues, so that all parameters get a
    gradient. A smaller `effort` replaces the threshold by threshold ** effort.

    Args:
        steps: maximum number of extra passes; 0 gives the plain backbone.
        threshold: a token continues if the decider's probability of "hard" is at least this value. A `positive_weight`
            of w multiplies the decider's odds by w: 0.8 at w = 5.4 is a true probability of 0.43.
        top_k: number of most likely tokens in the mixture.
        halting: ``"decider"`` (the paper), ``"fixed"`` (every token continues), or a control: ``"random"``,
            ``"oracle"`` (`pondera.methods.think.common.halting`).
        decider_width: W; default: ``None``, a quarter of the model's width.
        decider_layers: residual blocks.
        positive_weight: weight of a hard token in the decider's loss; an easy token has weight 1.
        continue_prob: for ``"random"``: the probability that a token takes the next pass.

    Example:
        >>> ThinkAtHard(steps=1).slots(tokens=8, shares=[1, 0.25])
        10.0
    """

    paper: ClassVar[str] = "Think-at-Hard, arXiv 2511.08577"
    cost: ClassVar[str] = "1 + share of hard tokens passes and KV slots per token, decider, head per mixture"
    examples: ClassVar[dict[str, str]] = {
        "exact": "ThinkAtHard(steps=2, threshold=0.5, top_k=8)",
        "identity": "ThinkAtHard(steps=0)",
    }
    attend: ClassVar[Attend] = "all_shallower"

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
            raise UserError(
                f"positive_weight={positive_weight}: give more than 0; 1 gives hard and easy tokens the same weight"
            )
        self.steps, self.threshold, self.positive_weight = steps, threshold, positive_weight
        self.decider_width, self.decider_layers = decider_width, decider_layers
        self.slots_per_token = steps + 1
        self.feedback = Feedback("vocab", top_k)
        self.needs_vocabulary = self.feedback.needs_vocabulary
        self.halting = Halting(halting, "decider", continue_prob)
        self.adaptive = self.halting.adaptive and steps > 0

    def bind(self, backbone: Backbone) -> None:
        """Raises if the backbone does not support the mask or the sum of logits; creates the decider."""
        if not self.steps:
            return
        if why := _misfit(backbone):
            raise UserError(f"ThinkAtHard does not fit {backbone.config.model_type}: {why}")
        self.feedback.bind(backbone)
        if self.halting.learned:
            weight, width = next(backbone.parameters()), backbone.config.hidden_size
            inner = self.decider_width or max(1, width // 4)
            self.decider = Decider(width, inner, self.decider_layers).to(weight.device, weight.dtype)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. In training the labels decide, and the decider learns to predict their decision."""
        batch = self.halting.keyed(batch)
        passes = self.new_passes(backbone, batch)
        state_BTD = total_BTD = passes.run_first(batch.h_BTD)
        totals, decider_losses = [total_BTD], []
        for step in range(1, batch.budget.passes(self.slots_per_token, self.halting.learned)):
            predict = partial(_likeliest, backbone, passes, total_BTD)
            if self.halting.learned:
                continue_BT, decider_loss = self._decide(passes, state_BTD, batch, predict)
                decider_losses += [decider_loss] if decider_loss is not None else []
            else:
                continue_BT = self.halting.continue_mask(
                    step, batch.position_ids, batch.labels_BT, predict, batch.prefix_BT
                )
            if not passes.mask_active(continue_BT):
                break
            x_BTD = passes.of_active(partial(self.feedback, backbone), total_BTD)
            state_BTD = passes.run_pass(step, x_BTD, state_BTD)
            total_BTD = passes.where_active(total_BTD + state_BTD, total_BTD)
            totals.append(total_BTD)
        passes.finish()
        terms = {}
        if decider_losses:
            losses, counts = zip(*decider_losses, strict=True)
            terms = {"decider": LossTerm(torch.stack(losses).sum(), torch.stack(counts).sum())}
        return MethodOutput(total_BTD, passes.passes_BT, terms, trace={"states": totals} if self.record else {})

    def _decide(
        self, passes: Passes, state_BTD: Tensor, batch: TokenBatch, predict: Callable[[], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The mask of tokens that continue; in training also the decider's summed loss and its number of tokens."""
        labels_BT = batch.labels_BT
        logit_BT = passes.of_active(self.decider, state_BTD.detach())[..., 0].float()
        if not self.training or labels_BT is None:
            return logit_BT.sigmoid() >= batch.budget.threshold(self.threshold), None
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
        """See `Think.slots`: skipped passes use no slots."""
        return tokens * (sum(shares) if shares else self.slots_per_token)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. The cache masks slots and never drops them, so sliding windows save nothing."""
        shares = shares or [1] * self.slots_per_token
        deferred, thinking = tokens * sum(shares[:-1]), tokens * sum(shares[1:])
        schedule: list[DecoderPass | MatMul] = [*self.feedback.cost_schedule(thinking)]
        if self.halting.learned and self.steps:
            schedule.append(MatMul(deferred, sum(p.numel() for p in self.decider.parameters() if p.ndim == 2)))
            if training:  # the head's predictions, which label tokens as hard
                schedule.append(MatMul(deferred, "head", trained=False))
        return [*schedule, *all_shallower_passes(tokens, context, shares)]


class Decider(nn.Module):
    """Predicts how likely a token is hard from its state: a residual MLP with pre-LayerNorm blocks.

    Args:
        width: D, the width of the states.
        inner: W.
        layers: residual blocks, of inner width 4 W.

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
    """The most likely next token ``[B, T]``, from the states summed so far."""

    @torch.no_grad()
    def best(state_BTD: Tensor) -> Tensor:
        return backbone.head(state_BTD).argmax(-1, keepdim=True)

    return passes.of_active(best, total_BTD)[..., 0]


def _misfit(backbone: Backbone) -> str:
    """Why a backbone does not support this method; an empty string if it does."""
    if "linear_attention" in backbone.layer_types:
        return (
            "its linear-attention layers read slots in storage order and cannot hide later depths; use "
            "PonderLM2(thoughts=1, feedback='vocab') on this backbone"
        )
    capped = getattr(backbone.config, "final_logit_softcapping", None) is not None
    if capped or getattr(backbone.lm.get_output_embeddings(), "bias", None) is not None:
        return (
            f"its head {'soft-caps logits' if capped else 'has a bias'}, so logits of several passes do not add up as "
            "their states do; use AdaptiveLatentCoT(steps=1) on this backbone"
        )
    return ""

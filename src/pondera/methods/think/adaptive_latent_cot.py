"""Token-level adaptive latent chain of thought: latent steps on a second causal axis, with exact parallel training.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.effort import Effort
from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting, continue_prob_for, router
from pondera.methods.think.common.halting_think import ReachThink
from pondera.methods.think.common.passes import Attend, Passes, all_shallower_passes
from pondera.methods.think.common.ramp import Ramp, checked, height
from pondera.models.backbone import Backbone
from pondera.models.method import DeferredLoss, Terms


class AdaptiveLatentCoT(ReachThink):
    """Each token takes up to L extra passes; step k of a token attends to steps 0..k of all tokens up to it.

    The two-axis mask is the difference to `PonderLM2`: step 0 never attends to a latent step, so step k of all tokens
    can run in parallel once the lower steps are known. Training computes exactly the function that decoding computes,
    without a fixed-point iteration. With ``halting="router"`` a router after each step outputs the probability to
    continue. The product of these probabilities is the probability that the token *reaches* a step. A token halts when
    this probability falls below `threshold`, in training and at inference. The prediction mixes the states of all
    steps, weighted by the *exit* probabilities. A penalty on the reach probabilities, weighted by the probability of
    the correct token, teaches the router to halt easy tokens and leaves it unchanged where the model is wrong.

    Source: Pretraining with token-level adaptive latent chain-of-thought, arXiv 2602.08220.
    Cost: 1 + (mean number of steps) passes and KV slots per token, the same in training and at inference; step k
    attends to the slots of k + 1 steps.
    When not to use it: on decoders with linear-attention layers, whose state follows storage order (raises an error);
    with gradient checkpointing, because checkpointing cannot keep the sub-caches.
    Resolved: the feedback is the last hidden state, RMS-matched on backbones whose embeddings are not at unit RMS. The
    method mixes states, not probabilities. The penalty is lambda * mean of sg(p_true)^beta * (sum of the probabilities
    to reach the steps that were taken), with p_true from the final prediction. The penalty starts after a part of the
    training, because a step gains nothing before the model has learned to use it. The router starts at the probability
    0.99: if the mixture starts with more weight on early states, the deepest state learns less, even without a penalty.
    In training some random tokens take a step that the router would not take. Otherwise a router that has learned to
    halt a token early would never see again what a step gains, and in the end every token would take one pass. The last
    step of a token gets all remaining probability. The paper's feedback, threshold, penalty and schedule were not
    available to us.

    Args:
        steps: L, the maximum number of extra passes per token; 0 gives the plain backbone.
        halting: ``"router"`` (the paper), ``"fixed"`` (every token takes all steps, the prediction uses the last state),
            or a control: ``"random"``, ``"oracle"`` (`pondera.methods.think.common.halting`).
        threshold: a token takes a step if the probability to reach it is at least this value.
        penalty: lambda, the cost of one full step in nats; larger values prune more.
        ramp: (start, end), the shares of the training between which the penalty grows from 0 to `penalty`.
        beta: exponent of the correctness weight; larger values lower the penalty on wrong predictions; 0: no weighting.
        continue_prob: for ``"random"``: the probability that a token takes the next step.
        explore: in training, the share of the halted tokens that take the next step anyway; falls to 0 at the end.

    Example:
        >>> AdaptiveLatentCoT(steps=1, halting="fixed").cost_schedule(tokens=8)[-1]
        DecoderPass(queries=8, keys=16, cached=False, repeats=1)
    """

    paper: ClassVar[str] = "Token-level adaptive latent CoT, arXiv 2602.08220"
    cost: ClassVar[str] = "1 + mean steps taken passes and KV slots per token; training the same passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "AdaptiveLatentCoT(steps=2, halting='fixed')",
        "identity": "AdaptiveLatentCoT(steps=0, halting='fixed')",
        "exact-router": "AdaptiveLatentCoT(steps=2, halting='router', threshold=0.5)",
        "identity-router": "AdaptiveLatentCoT(steps=0, halting='router')",
        "exact-random": "AdaptiveLatentCoT(steps=2, halting='random')",
        "identity-random": "AdaptiveLatentCoT(steps=2, halting='random', continue_prob=0.0)",
    }
    attend: ClassVar[Attend] = "all_shallower"

    def __init__(
        self,
        steps: int = 3,
        halting: str = "router",
        threshold: float = 0.05,
        penalty: float = 0.01,
        beta: float = 1.0,
        continue_prob: float = 0.5,
        explore: float = 0.1,
        ramp: Ramp = (0.3, 0.7),
    ) -> None:
        super().__init__()
        if steps < 0:
            raise UserError(f"steps={steps}: give 0 (no thinking) or more")
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: give a probability between 0 and 1")
        if penalty < 0 or beta < 0:
            raise UserError(f"penalty={penalty}, beta={beta}: give 0 or more")
        if not 0 <= explore <= 1:
            raise UserError(f"explore={explore}: give a share from 0 to 1")
        self.steps, self.threshold, self.penalty, self.beta, self.explore = steps, threshold, penalty, beta, explore
        self.ramp, self._penalty_now = checked(ramp), penalty
        self.slots_per_token = steps + 1
        self.feedback = Feedback("hidden")
        self.halting = Halting(halting, "router", continue_prob)
        weighted = "weights its penalty with the probability of the next token" if self.halting.learned else ""
        self.needs_vocabulary = weighted or self.halting.needs_vocabulary
        self.adaptive = self.halting.adaptive and steps > 0

    def bind(self, backbone: Backbone) -> None:
        """Raises if the backbone does not support the mask; measures the feedback scale and creates the router."""
        if self.steps and "linear_attention" in backbone.layer_types:
            raise UserError(
                f"AdaptiveLatentCoT does not fit {backbone.config.model_type}: its linear-attention layers read slots "
                "in storage order and cannot hide later thinking steps; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)
        if self.halting.learned and self.steps:
            self.router = router(backbone, start=0.99)

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """See `ReachThink.begin_step`; also sets the penalty."""
        super().begin_step(step, seed, progress)
        self._penalty_now = self.penalty * height(self.ramp, progress)

    def next_input(self, backbone: Backbone, step: int, state_BTD: Tensor) -> Tensor:
        """The last hidden states."""
        return self.feedback(backbone, state_BTD)

    def reach(self, state_BTD: Tensor, reach_BT: Tensor) -> Tensor:
        """The product of the router's probabilities to continue."""
        return reach_BT * self.router(state_BTD)[..., 0].float().sigmoid()

    def takes(self, reach_BT: Tensor, budget: Effort) -> Tensor:
        """Tokens whose probability to reach the step is at least the threshold."""
        return reach_BT >= budget.threshold(self.threshold)

    def losses(self, passes: Passes, reach: list[Tensor]) -> tuple[Terms, DeferredLoss | None]:
        """The correctness-weighted penalty on continuing, which needs the logits."""

        def penalty(logits_BTV: Tensor, labels_BT: Tensor) -> Terms:
            known_BT = labels_BT >= 0
            true_BT = logits_BTV.detach().float().softmax(-1).gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
            cost_BT = true_BT**self.beta * torch.stack(reach[1:]).sum(0)
            return {"thinking": LossTerm(cost_BT[known_BT].sum(), known_BT.sum(), self._penalty_now)}

        return {}, penalty if len(reach) > 1 else None

    def random_control(self, passes: float) -> AdaptiveLatentCoT | None:
        """See `Method.random_control`; the probability to continue has four digits, as a spec string is to be read."""
        if not self.halting.learned or not self.steps:
            return None
        continue_prob = round(continue_prob_for(passes, self.steps), 4)
        return AdaptiveLatentCoT(self.steps, halting="random", continue_prob=continue_prob)

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """See `Think.slots`: skipped steps use no slots."""
        return tokens * (sum(shares) if shares else self.slots_per_token)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. The cache masks slots and never drops them, so sliding windows save nothing."""
        shares = shares or [1] * self.slots_per_token
        schedule: list[DecoderPass | MatMul] = list(all_shallower_passes(tokens, context, shares))
        if self.halting.learned and self.steps:
            schedule.append(MatMul(tokens * sum(shares[:-1]), self.router.weight.numel()))
        return schedule

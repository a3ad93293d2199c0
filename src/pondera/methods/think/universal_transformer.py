"""Universal Transformer: the layer stack, applied repeatedly with shared weights and adaptive halting per token.

Shapes: B batch, T tokens, D width, N extra passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.core.effort import Effort
from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting, router
from pondera.methods.think.common.halting_think import ReachThink
from pondera.methods.think.common.passes import Attend, Passes, same_depth_passes
from pondera.models.backbone import Backbone
from pondera.models.method import DeferredLoss, Terms


class UniversalTransformer(ReachThink):
    """Applies the backbone up to R times to its own output as one shared block; each token halts individually (ACT).

    The input of pass n + 1 is the state after pass n plus a learned embedding of the pass index. With ``halting="act"``
    (adaptive computation time) a halting unit outputs a probability p for every state. A token halts once the sum of
    its probabilities reaches 1 - epsilon. Its last pass gets the remainder, so that the weights sum to 1, and the
    prediction uses the weighted mean of its states. A halted token is frozen: its state is copied, and later passes of
    other tokens attend to the keys and values of its last pass.

    Source: Universal Transformers, arXiv 1807.03819, with the halting of Adaptive Computation Time, arXiv 1603.08983.
    Cost: 1 + (mean number of extra passes) passes per token, the same in training and at inference; R KV slots per
    token, even if it halts early. A pass attends only to the slots of its own depth.
    When not to use it: when KV memory is the bottleneck, because all R slots are always used; on decoders with
    linear-attention layers, whose state follows storage order (raises an error); with gradient checkpointing, which
    cannot keep the slots of halted tokens.
    Resolved: the shared block is the whole stack. A state is therefore fed back after the final norm, RMS-matched if
    embeddings are not at unit RMS. A halted token keeps its last keys and values; the paper recomputes them from its
    state in each pass. The halting unit reads the output state of a pass, as in the ACT paper (the authors' code: the
    input of the pass). A token halts after the pass in which the sum reaches 1 - epsilon (sum >= 1 - epsilon, as in the
    ACT paper; the authors' code uses >, which differs only in ties). The weighted mean is from the ACT paper (the
    authors' default blends running states instead). The backbone has its own positions, so the extra embedding encodes
    only the pass. It is learned and starts at zero; pass 0, which is the plain backbone, has none. p starts at 1 / R,
    so training starts with all passes at equal weights (the authors' code: at 0.73, with two passes). The ponder cost,
    passes + remainder, is a mean over all tokens except padding. The number of passes has no gradient, so the cost acts
    through the remainder, and not at all on a token that halts after its first pass. A smaller `effort` replaces
    epsilon by epsilon ** effort. If `max_passes` stops a token, its last pass gets the remainder.

    Args:
        steps: R - 1, the maximum number of extra passes; 0 gives the plain backbone.
        halting: ``"act"`` (the paper), ``"fixed"`` (every token takes all passes, the prediction uses the last state),
            or a control: ``"random"``, ``"oracle"`` (`pondera.methods.think.common.halting`).
        epsilon: a token halts when its remaining probability is at most this value.
        ponder_cost: cost of one pass in nats; if too high, all tokens use one pass; if too low, all use every pass.
        continue_prob: for ``"random"``: the probability that a token takes the next pass.

    Example:
        >>> UniversalTransformer(steps=3).slots(tokens=8, shares=[1, 0.5, 0.25, 0])
        32
    """

    paper: ClassVar[str] = "Universal Transformers, arXiv 1807.03819"
    cost: ClassVar[str] = "1 + mean extra passes, R KV slots per token; training the same passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "UniversalTransformer(steps=2, epsilon=0.3)",
        "identity": "UniversalTransformer(steps=0)",
        "exact-fixed": "UniversalTransformer(steps=2, halting='fixed')",
        "identity-fixed": "UniversalTransformer(steps=0, halting='fixed')",
    }
    attend: ClassVar[Attend] = "same_depth"

    def __init__(
        self,
        steps: int = 3,
        halting: str = "act",
        epsilon: float = 0.01,
        ponder_cost: float = 0.01,
        continue_prob: float = 0.5,
    ) -> None:
        super().__init__()
        if steps < 0:
            raise UserError(f"steps={steps}: give 0 (no thinking) or more")
        if not 0 < epsilon < 1:
            raise UserError(f"epsilon={epsilon}: give a probability between 0 and 1, such as 0.01")
        if ponder_cost < 0:
            raise UserError(f"ponder_cost={ponder_cost}: give 0 or more")
        self.steps, self.epsilon, self.ponder_cost = steps, epsilon, ponder_cost
        self.slots_per_token = steps + 1
        self.feedback = Feedback("hidden")
        self.halting = Halting(halting, "act", continue_prob)
        self.needs_vocabulary = self.halting.needs_vocabulary
        self.adaptive = self.halting.adaptive and steps > 0

    def bind(self, backbone: Backbone) -> None:
        """Raises if the backbone has linear attention; measures the feedback scale, creates the new parameters."""
        if not self.steps:
            return
        if "linear_attention" in backbone.layer_types:
            raise UserError(
                f"UniversalTransformer does not fit {backbone.config.model_type}: its linear-attention layers keep a "
                "state in storage order, not KV slots of each pass; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)
        weight = next(backbone.parameters())
        signal_ND = torch.zeros(self.steps, backbone.config.hidden_size, dtype=weight.dtype, device=weight.device)
        self.signal_ND = nn.Parameter(signal_ND)
        if self.halting.learned:
            self.halting_unit = router(backbone, start=1 / self.slots_per_token)

    def next_input(self, backbone: Backbone, step: int, state_BTD: Tensor) -> Tensor:
        """The states, plus the embedding of the pass."""
        return self.feedback(backbone, state_BTD) + self.signal_ND[step - 1].to(state_BTD.dtype)

    def reach(self, state_BTD: Tensor, reach_BT: Tensor) -> Tensor:
        """The probability that remains: 1 less the sum of the halting probabilities, and 0 where the sum exceeds 1."""
        # Below 0 a token halts in any case, unless the caller chooses its passes; later states then get no weight.
        return (reach_BT - self.halting_unit(state_BTD)[..., 0].float().sigmoid()).clamp(min=0)

    def takes(self, reach_BT: Tensor, budget: Effort) -> Tensor:
        """Tokens whose remaining probability is above epsilon."""
        return reach_BT > budget.threshold(self.epsilon)

    def losses(self, passes: Passes, reach: list[Tensor]) -> tuple[Terms, DeferredLoss | None]:
        """The ponder cost: passes + remainder, where the remainder is the weight of the token's last pass."""
        if not self.steps:
            return {}, None
        remainder_BT = torch.stack(reach).gather(0, passes.passes_BT[None] - 1)[0]
        real_BT = passes.real(torch.ones_like(passes.passes_BT, dtype=torch.bool))
        cost = LossTerm((passes.passes_BT + remainder_BT)[real_BT].sum(), real_BT.sum(), self.ponder_cost)
        return {"ponder": cost}, None

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. The cache masks slots and never drops them, so sliding windows save nothing."""
        shares = shares or [1] * self.slots_per_token
        schedule: list[DecoderPass | MatMul] = list(same_depth_passes(tokens, context, shares))
        if self.halting.learned and self.steps:
            schedule.append(MatMul(tokens * sum(shares[:-1]), self.halting_unit.weight.numel()))
        return schedule

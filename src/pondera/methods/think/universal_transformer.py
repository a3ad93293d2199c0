"""Universal Transformer: the layer stack, applied repeatedly with shared weights and adaptive halting per token.

Shapes: B batch, T tokens, D width, N extra passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting, exit_probabilities, router
from pondera.methods.think.common.passes import Passes, SlotCache, new_slot_cache, same_depth_passes
from pondera.methods.think.common.readout import mixture
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker


class UniversalTransformer(Think):
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
    cost: ClassVar[str] = "1 + mean extra passes, R KV rows per token; training the same passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "UniversalTransformer(steps=2, epsilon=0.3)",
        "identity": "UniversalTransformer(steps=0)",
        "exact-fixed": "UniversalTransformer(steps=2, halting='fixed')",
        "identity-fixed": "UniversalTransformer(steps=0, halting='fixed')",
    }
    drops_window_rows: ClassVar[bool] = False
    supports_recompute: bool = False

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

    def begin_step(self, step: int, seed: int) -> None:
        """Sets the random draw of this step."""
        self.halting.draw = 1 + step

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> SlotCache:
        """One sub-cache per pass in every layer; each has one slot per token."""
        return new_slot_cache(backbone, self.slots_per_token, kv_cache)

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
        """See `Think.forward`. Training, prefill and decoding share this loop."""
        cache = cache if isinstance(cache, SlotCache) else self.new_cache(backbone)
        passes = Passes(backbone, position_ids, cache, mask, h_BTD.shape[1], "same_depth", self.packed)
        state_BTD = passes.run_first(h_BTD)
        states, remaining = [state_BTD], [torch.ones_like(state_BTD[..., 0], dtype=torch.float32)]
        for step in range(1, budget.passes(self.slots_per_token, self.halting.learned)):
            remaining_BT, continue_BT = self._halt(
                backbone, step, state_BTD, remaining[-1], position_ids, labels_BT, budget
            )
            if not passes.mask_active(continue_BT):
                break
            x_BTD = self.feedback(backbone, state_BTD) + self.signal_ND[step - 1].to(state_BTD.dtype)
            state_BTD = passes.run_pass(step, x_BTD, state_BTD)
            states.append(state_BTD)
            remaining.append(passes.where_active(remaining_BT, 0.0))
        passes.finish()
        terms = {}
        if self.halting.learned:
            state_BTD = mixture(states, exit_probabilities(remaining))
            if self.training and self.steps:
                terms = {"ponder": self._ponder_cost(passes, remaining)}
        return MethodOutput(state_BTD, passes.passes_BT, terms, trace={"states": states} if self.record else {})

    def _halt(
        self,
        backbone: Backbone,
        step: int,
        state_BTD: Tensor,
        remaining_BT: Tensor,
        position_ids: Tensor,
        labels_BT: Tensor | None,
        budget: Effort,
    ) -> tuple[Tensor, Tensor | None]:
        """The probability that remains from `step` on, and the mask of tokens that take `step` (``None``: all)."""
        if self.halting.learned:
            remaining_BT = remaining_BT - self.halting_unit(state_BTD)[..., 0].float().sigmoid()
            return remaining_BT, remaining_BT > budget.threshold(self.epsilon)
        continue_BT = self.halting.continue_mask(
            step, position_ids, labels_BT, lambda: backbone.head(state_BTD.detach()).argmax(-1)
        )
        return remaining_BT, continue_BT

    def _ponder_cost(self, passes: Passes, remaining: list[Tensor]) -> LossTerm:
        """The ponder cost: passes + remainder, where the remainder is the weight of the token's last pass."""
        remainder_BT = torch.stack(remaining).gather(0, passes.passes_BT[None] - 1)[0]
        real_BT = passes.real(torch.ones_like(passes.passes_BT, dtype=torch.bool))
        return LossTerm((passes.passes_BT + remainder_BT)[real_BT].sum(), real_BT.sum(), self.ponder_cost)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. The cache masks slots and never drops them, so sliding windows save nothing."""
        shares = shares or [1] * self.slots_per_token
        schedule: list[DecoderPass | MatMul] = list(same_depth_passes(tokens, context, shares))
        if self.halting.learned and self.steps:
            schedule.append(MatMul(tokens * sum(shares[:-1]), self.halting_unit.weight.numel()))
        return schedule

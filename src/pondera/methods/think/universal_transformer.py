"""Universal Transformer: the whole stack again and again with shared weights, until each token has thought enough.

Shapes: B batch, T tokens, D width, N extra passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting, exit_probabilities, router
from pondera.methods.think.common.passes import Passes, same_depth_passes
from pondera.methods.think.common.readout import mixture
from pondera.models.backbone import Backbone


class UniversalTransformer(Think):
    """The backbone is one shared block, applied up to R times to its own output; each token halts by itself (ACT).

    Pass n + 1 reads the state that pass n left, plus a learned signal that says which pass it is. With
    ``halting="act"`` (adaptive computation time) a halting unit reads a probability p from every state. A token halts
    as soon as its probabilities so far add up to 1 - epsilon; its last pass gets the remainder, so that they sum to 1,
    and the prediction is made from the mean of its states by these weights. What has halted stays as it is: its state
    is copied forward, and in later passes the others attend to the keys and values of its last one.

    Source: Universal Transformers, arXiv 1807.03819, with the halting of Adaptive Computation Time, arXiv 1603.08983.
    Cost: 1 + (mean of the extra passes) passes per token, in training as at inference; R KV rows per token however
    early it halts, of which a pass attends to its own.
    When not to use it: for KV memory, which is paid in full; on decoders with linear-attention layers, whose state
    follows storage order (refused by name); with gradient checkpointing, which cannot keep the rows of the halted.
    Resolved: the shared block is the whole stack, so a state is fed back after the final norm, RMS-matched where
    embeddings do not enter at unit RMS, and a halted token shows its last keys and values, where the paper computes
    them anew from its state in each pass. p is read from the state that a pass leaves, as in the ACT paper (the
    authors' code: from the pass's input). A token halts after the pass with which the sum reaches 1 - epsilon (sum >=
    1 - epsilon, as in the ACT paper; the authors' code asks for more than that, which differs in ties only). The
    weighted mean is the ACT paper's (the authors' default blends running states instead). Positions are the backbone's
    own, so the signal is of the pass alone; it is learned, from zero, and there is none in pass 0, which is the backbone
    itself. p starts at 1 / R, so that training starts with all passes at equal weights (the authors' code: at 0.73, with
    two). The ponder cost, passes + remainder, is a mean over all tokens but padding; as the number of passes has no
    gradient, it teaches through the remainder, and not at all where a token halts after its first pass. A smaller
    `effort` turns epsilon into epsilon ** effort; where `max_passes` ends a token's thinking, its last pass gets the
    remainder.

    Args:
        steps: extra passes at most, R - 1; 0 is the backbone itself.
        halting: ``"act"`` (the paper), ``"fixed"`` (every token takes all passes, and the last state is read), or a
            control: ``"random"``, ``"oracle"`` (`pondera.methods.think.common.halting`).
        epsilon: a token halts when less than or just this much of its probability is left.
        ponder_cost: what a whole pass costs in nats; too high collapses to one pass, too low uses all.
        continue_prob: ``"random"``: the share of tokens that take each further pass.

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
    supports_recompute: ClassVar[bool] = False

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
        self.adaptive = self.halting.adaptive and steps > 0

    def bind(self, backbone: Backbone) -> None:
        """Refuses backbones without rows to copy; measures the feedback's scale, creates signals and halting unit."""
        if not self.steps:
            return
        if "linear_attention" in backbone.layer_types:
            raise UserError(
                f"UniversalTransformer does not fit {backbone.config.model_type}: its linear-attention layers keep a "
                "state in storage order, not rows of each pass; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)
        weight = next(backbone.parameters())
        signal_ND = torch.zeros(self.steps, backbone.config.hidden_size, dtype=weight.dtype, device=weight.device)
        self.signal_ND = nn.Parameter(signal_ND)
        if self.halting.learned:
            self.halting_unit = router(backbone, start=1 / self.slots_per_token)

    def begin_step(self, step: int, seed: int) -> None:
        """Lets a random control draw anew."""
        self.halting.draw = 1 + step

    def new_cache(self, backbone: Backbone) -> DepthCache:
        """One sub-cache per pass in every layer, with a row of every token in each."""
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
        """See `Think.forward`. Training, prefill and decoding are this one loop."""
        cache = cache if isinstance(cache, DepthCache) else self.new_cache(backbone)
        passes = Passes(backbone, position_ids, cache, mask, h_BTD.shape[1], "same_depth", self.packed)
        state_BTD = passes.run_first(h_BTD)
        states, left = [state_BTD], [torch.ones_like(state_BTD[..., 0], dtype=torch.float32)]
        for step in range(1, budget.passes(self.slots_per_token, self.halting.learned)):
            left_BT, continue_BT = self._halt(backbone, step, state_BTD, left[-1], position_ids, labels_BT, budget)
            if not passes.mask_active(continue_BT):
                break
            x_BTD = self.feedback(backbone, state_BTD) + self.signal_ND[step - 1].to(state_BTD.dtype)
            state_BTD = passes.run_pass(step, x_BTD, state_BTD)
            states.append(state_BTD)
            left.append(passes.where_active(left_BT, 0.0))
        passes.finish()
        terms = {}
        if self.halting.learned:
            state_BTD = mixture(states, exit_probabilities(left))
            if self.training and self.steps:
                terms = {"ponder": self._ponder_cost(passes, left)}
        return MethodOutput(state_BTD, passes.passes_BT, terms, trace={"states": states} if self.record else {})

    def _halt(
        self,
        backbone: Backbone,
        step: int,
        state_BTD: Tensor,
        left_BT: Tensor,
        position_ids: Tensor,
        labels_BT: Tensor | None,
        budget: Effort,
    ) -> tuple[Tensor, Tensor | None]:
        """The probability that is left for `step` and those after it, and who takes it (none: everyone)."""
        if self.halting.learned:
            left_BT = left_BT - self.halting_unit(state_BTD)[..., 0].float().sigmoid()
            return left_BT, left_BT > budget.threshold(self.epsilon)
        continue_BT = self.halting.continue_mask(
            step, position_ids, labels_BT, lambda: backbone.head(state_BTD.detach()).argmax(-1)
        )
        return left_BT, continue_BT

    def _ponder_cost(self, passes: Passes, left: list[Tensor]) -> LossTerm:
        """Passes + remainder, which is what was left for the last pass that a token took."""
        remainder_BT = torch.stack(left).gather(0, passes.passes_BT[None] - 1)[0]
        real_BT = passes.real(torch.ones_like(passes.passes_BT, dtype=torch.bool))
        return LossTerm((passes.passes_BT + remainder_BT)[real_BT].sum(), real_BT.sum(), self.ponder_cost)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. Rows are masked, never dropped, so no call is shortened by a sliding window."""
        shares = shares or [1] * self.slots_per_token
        made: list[DecoderPass | MatMul] = list(same_depth_passes(tokens, context, shares))
        if self.halting.learned and self.steps:
            made.append(MatMul(tokens * sum(shares[:-1]), self.halting_unit.weight.numel()))
        return made

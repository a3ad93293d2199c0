"""Base classes of think methods whose tokens halt individually.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.effort import Effort
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.methods.think.common.halting import Halting, exit_probabilities
from pondera.methods.think.common.passes import Attend, Passes, SlotCache, new_slot_cache
from pondera.methods.think.common.readout import mixture
from pondera.models.backbone import Backbone
from pondera.models.method import DeferredLoss, SlotMaker, Terms


class HaltingThink(Think):
    """A think method that runs `Passes`: after each pass, a rule or a control decides which tokens take the next one.

    Attributes:
        halting: the control, or a marker that the method's own rule decides.
    """

    attend: ClassVar[Attend]
    """The slots that a pass attends to; see `Passes`."""

    drops_window_rows: ClassVar[bool] = False
    supports_recompute: bool = False
    accepts_passes: bool = True
    halting: Halting

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """Sets the random draw of this step."""
        self.halting.begin_step(step, seed)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> SlotCache:
        """One sub-cache per pass in every layer."""
        return new_slot_cache(backbone, self.slots_per_token, kv_cache)

    def new_passes(self, backbone: Backbone, batch: TokenBatch) -> Passes:
        """The passes of a call, before the first one."""
        cache = batch.cache if isinstance(batch.cache, SlotCache) else self.new_cache(backbone)
        tokens = batch.h_BTD.shape[1]
        return Passes(
            backbone, batch.position_ids, cache, batch.mask, tokens, self.attend, self.packed, batch.passes_BT
        )


class ReachThink(HaltingThink):
    """A think method with a probability that each token reaches each pass; the prediction mixes the states of all passes.

    The weight of a state is the probability that the token exits there: the probability to reach its pass less that to
    reach the next one. Under a control the prediction uses the last state.

    Attributes:
        explore: in training, the share of tokens that take a pass although the rule halts them there. It falls to 0 at
            the end of the training, which then computes what inference computes.
    """

    explore: float = 0.0
    _explore_now: float = 0.0

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """See `HaltingThink.begin_step`; also sets the share of explored passes."""
        super().begin_step(step, seed, progress)
        self._explore_now = self.explore * (1 - progress)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. Training, prefill and decoding share this loop."""
        batch = self.halting.keyed(batch)
        passes, learned = self.new_passes(backbone, batch), self.halting.learned
        state_BTD = passes.run_first(batch.h_BTD)
        states, reach = [state_BTD], [torch.ones_like(state_BTD[..., 0], dtype=torch.float32)]
        for step in range(1, batch.budget.passes(self.slots_per_token, learned)):
            reach_BT = self.reach(state_BTD, reach[-1]) if learned else reach[-1]
            if not passes.mask_active(self._continues(backbone, batch, step, state_BTD, reach_BT)):
                break
            state_BTD = passes.run_pass(step, self.next_input(backbone, step, state_BTD), state_BTD)
            states.append(state_BTD)
            reach.append(passes.where_active(reach_BT, 0.0))
        passes.finish()
        if learned:
            state_BTD = mixture(states, exit_probabilities(reach))
        terms, deferred_loss = self.losses(passes, reach) if self.training and learned else ({}, None)
        trace = {"states": states} if self.record else {}
        return MethodOutput(state_BTD, passes.passes_BT, terms, deferred_loss, trace)

    def _continues(
        self, backbone: Backbone, batch: TokenBatch, step: int, state_BTD: Tensor, reach_BT: Tensor
    ) -> Tensor | None:
        """The tokens that take a pass; `None`: all tokens."""
        if not self.halting.learned:
            predict = partial(_likeliest, backbone, state_BTD)
            return self.halting.continue_mask(step, batch.position_ids, batch.labels_BT, predict, batch.prefix_BT)
        continue_BT, explored_BT = self.takes(reach_BT, batch.budget), None
        if self.training:
            explored_BT = self.halting.explored(step, batch, self._explore_now)
        return continue_BT if explored_BT is None else continue_BT | explored_BT

    @abstractmethod
    def next_input(self, backbone: Backbone, step: int, state_BTD: Tensor) -> Tensor:
        """The inputs of pass `step`, 1, 2, ..., from the states of the pass before."""

    @abstractmethod
    def reach(self, state_BTD: Tensor, reach_BT: Tensor) -> Tensor:
        """The probability that a token reaches the next pass, ``[B, T]``.

        Args:
            state_BTD: the states so far.
            reach_BT: the probability that the token reached the pass of these states.
        """

    @abstractmethod
    def takes(self, reach_BT: Tensor, budget: Effort) -> Tensor:
        """Which tokens take the next pass, from the probability to reach it."""

    @abstractmethod
    def losses(self, passes: Passes, reach: list[Tensor]) -> tuple[Terms, DeferredLoss | None]:
        """The loss terms in training, and those that need logits.

        Args:
            passes: the passes of the call.
            reach: ``[B, T]`` per pass, the probability to reach it; 0 from the first pass that a token did not take.
        """


def _likeliest(backbone: Backbone, state_BTD: Tensor) -> Tensor:
    return backbone.head(state_BTD.detach()).argmax(-1)

"""Pause tokens: extra slots with constant learned inputs, a control for methods that feed states back.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.methods.think.common.interleave import interleaved_cache, interleaved_pass, slots_allowed
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker


class PauseToken(Think):
    """Inserts P learned vectors after every token and predicts from the last one.

    The extra slots give the model compute and KV slots, but no content computed by the model. The gain of a think
    method over this control is therefore the gain of feeding states back.

    Source: Think before you speak, arXiv 2310.02226, with a pause after every token as in the comparison of PonderLM-2.
    Cost: P + 1 passes and KV slots per token, the same in training and at inference; one call of P + 1 slots per token.
    When not to use it: for anything but a control.

    Args:
        pauses: P, pause slots per token; 0 gives the plain backbone.

    Example:
        >>> PauseToken(pauses=1).cost_schedule(tokens=8)
        [DecoderPass(queries=16, keys=16, cached=False, repeats=1)]
    """

    paper: ClassVar[str] = "Pause tokens, arXiv 2310.02226"
    cost: ClassVar[str] = "P+1 passes and KV slots per token; training the same"
    examples: ClassVar[dict[str, str]] = {"exact": "PauseToken(pauses=2)", "identity": "PauseToken(pauses=0)"}
    interleaved: ClassVar[bool] = True

    def __init__(self, pauses: int = 1) -> None:
        super().__init__()
        if pauses < 0:
            raise UserError(f"pauses={pauses}: give 0 (no pauses) or more")
        self.pauses = pauses
        self.slots_per_token = pauses + 1

    def bind(self, backbone: Backbone) -> None:
        """Creates the pause vectors with the RMS of the inputs, which are token embeddings or `Backbone.typical_inputs`."""
        device = next(backbone.parameters()).device
        ids_1V = torch.arange(min(256, backbone.config.vocab_size), device=device)[None]
        inputs_BTD = backbone.typical_inputs(ids_1V).detach()
        pause_PD = inputs_BTD.new_empty(self.pauses, inputs_BTD.shape[-1])
        if device.type != "meta":
            nn.init.normal_(pause_PD, std=inputs_BTD.float().square().mean().sqrt().item())
        self.pause_PD = nn.Parameter(pause_PD)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """One cache with P + 1 KV slots per token."""
        return interleaved_cache(backbone, self.slots_per_token, kv_cache)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. A smaller budget drops the last pauses."""
        h_BTD, cache = batch.h_BTD, batch.cache
        slots = slots_allowed(self.slots_per_token, batch.budget, cache)
        stages = [h_BTD, *(pause_D.expand_as(h_BTD) for pause_D in self.pause_PD[: slots - 1].to(h_BTD.dtype))]
        states = interleaved_pass(backbone, stages, batch.mask, batch.position_ids, cache)
        passes_BT = torch.full(h_BTD.shape[:2], slots, device=h_BTD.device)
        if cache is not None:
            cache.record(passes_BT)
        return MethodOutput(states[-1], passes_BT, trace={"states": states} if self.record else {})

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`."""
        slots = len(shares or ()) or self.slots_per_token
        return [DecoderPass(tokens * slots, (context + tokens) * slots, cached=context > 0)]

"""Adaptive latent chain of thought, at fixed depth: thoughts along a second causal axis, trained in parallel exactly.

Shapes: B batch, T tokens, K tokens cached and new, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.ground.cost import Call
from pondera.ground.errors import UserError
from pondera.model.backbone import Backbone, SlotMask, token_positions, within_documents
from pondera.model.cache import StagedLayer, TokenCache, at_step
from pondera.think.contract import Think, Thought
from pondera.think.parts.feedback import Feedback


class AdaptiveLatentCoT(Think):
    """Every token takes L extra passes; step k of a token attends to steps 0..k of all tokens up to it.

    The two-axis mask is what sets it apart from `PonderLM2`: step 0 never sees a thought, so step k of all tokens can
    run at once as soon as the steps below are known. Training is L + 1 passes of T rows, exactly the function that
    decoding computes, with no fixed point to wait for.

    Source: Pretraining with token-level adaptive latent chain-of-thought, arXiv 2602.08220.
    Cost: L + 1 passes and KV rows per token, in training as at inference; step k attends to k + 1 rows per token.
    When not to use it: on decoders with linear-attention layers, whose state follows storage order (refused by name);
    with gradient checkpointing, which cannot keep the sub-caches.
    Resolved: depth is fixed (every gate at 1), the read-out is the last step's state; feedback is the last hidden state,
    RMS-matched on backbones whose embeddings do not enter at unit RMS (the paper's own feedback was not visible).

    Args:
        steps: L, extra passes per token; 0 is the backbone itself.

    Example:
        >>> AdaptiveLatentCoT(steps=1).calls(tokens=8)
        [Call(queries=8, keys=8, cached=False, repeats=1), Call(queries=8, keys=16, cached=False, repeats=1)]
    """

    paper: ClassVar[str] = "Token-level adaptive latent CoT, arXiv 2602.08220 (fixed depth)"
    price: ClassVar[str] = "L+1 passes and KV rows per token; training the same L+1 passes"
    reproduced: ClassVar[str] = (
        "at 1.1 M parameters and 0.8 M tokens: level with PonderLM-2 at a quarter of its training FLOPs"
    )
    slides: ClassVar[bool] = False
    recomputable: ClassVar[bool] = False

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        if steps < 0:
            raise UserError(f"steps={steps}: give 0 (no thinking) or more")
        self.steps = steps
        self.slots_per_token = steps + 1
        self.feedback = Feedback("hidden")

    def attach(self, backbone: Backbone) -> None:
        """Refuses backbones that cannot follow the mask; measures the scale of the feedback."""
        if self.steps and "linear_attention" in backbone.layer_types:
            raise UserError(
                f"AdaptiveLatentCoT does not fit {backbone.config.model_type}: its linear-attention layers read slots in "
                "storage order and cannot hide later thinking steps; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.attach(backbone)

    def new_cache(self, backbone: Backbone) -> TokenCache:
        """One sub-cache per step in every layer."""
        layers = [StagedLayer(self.slots_per_token) for _ in range(backbone.config.num_hidden_layers)]
        return TokenCache(layers, self.slots_per_token)

    def forward(
        self,
        backbone: Backbone,
        h_BTD: Tensor,
        position_ids: Tensor,
        cache: TokenCache | None = None,
        mask: Tensor | None = None,
        budget: int | None = None,
    ) -> Thought:
        """See `Think.forward`. Training, prefill and decoding are this one loop; `budget` may cut the later steps."""
        steps = self.slots_per_token
        if budget is not None and budget < steps:
            if cache is not None:
                raise UserError(
                    f"budget={budget}: with a cache AdaptiveLatentCoT(steps={self.steps}) runs {steps} passes"
                )
            steps = max(1, budget)
        cache = cache if cache is not None else self.new_cache(backbone)
        allowed = self._one_step_mask(h_BTD, cache, mask, position_ids)
        x_BTD = state_BTD = h_BTD
        for step in range(steps):
            with at_step(cache, step) as slots:
                state_BTD = backbone.step(x_BTD, slots, _repeat(allowed, step + 1), position_ids)
            if step + 1 < steps:
                x_BTD = self.feedback(backbone, state_BTD)
        passes_BT = torch.full(h_BTD.shape[:2], steps, device=h_BTD.device)
        cache.record(passes_BT)
        return Thought(state_BTD, passes_BT)

    def _one_step_mask(self, h_BTD: Tensor, cache: TokenCache, mask: Tensor | None, position_ids: Tensor) -> SlotMask:
        """Causal order over tokens, which every step repeats for its own rows and for those of each step below."""
        tokens, total = h_BTD.shape[1], cache.tokens + h_BTD.shape[1]
        order_K = torch.arange(total, device=h_BTD.device)
        causal_BTK = (order_K[cache.tokens :, None] >= order_K)[None]
        key_positions_BK = order_K[None]
        if mask is not None:
            seen_BK = mask[:, :total].long()
            causal_BTK = causal_BTK & within_documents(seen_BK[:, cache.tokens :], seen_BK)
            key_positions_BK = token_positions(total, seen_BK, 0, h_BTD.device)
        return SlotMask(causal_BTK, position_ids.expand(-1, tokens), key_positions_BK)

    def calls(self, tokens: int, context: int = 0, training: bool = False) -> list[Call]:
        """See `Think.calls`. Rows are masked, never dropped, so no call is shortened by a sliding window."""
        keys = context + tokens
        return [Call(tokens, keys * (step + 1)) for step in range(self.slots_per_token)]


def _repeat(mask: SlotMask, times: int) -> SlotMask:
    return SlotMask(
        mask.allowed_BSK.repeat(1, 1, times), mask.query_positions_BS, mask.key_positions_BK.repeat(1, times)
    )

"""PonderLM: every token is read several times, each time with what the pass before predicted added to its embedding.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.cost.model import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.passes import Passes, same_depth_passes
from pondera.models.backbone import Backbone

STARTS = ("once", "steps")


class PonderLM(Think):
    """After each of s passes, the embedding of what the model would say next is added to its input; it reads once more.

    E_0 are the token embeddings. Pass i makes states H_i of E_i; the head turns them into probabilities, these mix the
    rows of the *input* embedding table into M_i, and E_{i+1} = E_i + M_i. The prediction is read from the last pass.
    Nothing is detached and only the last pass has a loss. A pass attends to the rows of its own depth alone, so training
    runs s + 1 ordinary causal passes, and decoding with s + 1 caches computes the same.

    Source: Pretraining language models to ponder in continuous space, arXiv 2505.20674, and the authors' public code.
    Cost: s + 1 passes and KV rows per token, in training as at inference; s times the head, and without `top_k` s times the
    mixture over the vocabulary, which for a narrow model cost as much as the passes.
    When not to use it: where the KV cache is what you are short of; on a vocabulary of characters, whose mixtures say
    little; on decoders with linear-attention layers (refused by name), as no cache here keeps their states by depth.
    Resolved: the paper mixes the 100 likeliest tokens, their probabilities renormalised, and the authors' code all of
    them; the default is the paper's, ``top_k=None`` the code's. E_0 is the embedding once, as in the paper's equation;
    ``start="steps"`` is the s-fold of the authors' larger runs, under any budget. The mixed rows are scaled as the inputs
    are: by sqrt(D) with ``init: scaled``, not at all on pretrained backbones. Initialisation is that of all methods here;
    the authors' code shrinks what enters the residual stream by a further sqrt(s + 1). A smaller budget makes fewer
    passes; where calls on one cache differ in it, tokens show at the depths that they did not reach what they left at
    their last, as in `AdaPonderLM`.

    Args:
        steps: s, passes before the last one; 0 is the backbone itself.
        top_k: how many of the likeliest tokens are mixed; none: all of them.
        start: E_0 is the embedding ``"once"`` or as many times as there are ``"steps"``.

    Example:
        >>> PonderLM(steps=1).cost_schedule(tokens=8)[1:]
        [DecoderPass(queries=8, keys=8, cached=False, repeats=1), DecoderPass(queries=8, keys=8, cached=False, repeats=1)]
    """

    paper: ClassVar[str] = "PonderLM, arXiv 2505.20674"
    cost: ClassVar[str] = "s+1 passes and KV rows, and s+1 heads, per token; training the same"
    examples: ClassVar[dict[str, str]] = {
        "exact": "PonderLM(steps=2, top_k=None)",
        "identity": "PonderLM(steps=0)",
        "exact-top": "PonderLM(steps=2, top_k=48, start='steps')",
        "identity-top": "PonderLM(steps=0, start='steps')",
    }
    drops_window_rows: ClassVar[bool] = False

    def __init__(self, steps: int = 3, top_k: int | None = 100, start: str = "once") -> None:
        super().__init__()
        if steps < 0:
            raise UserError(f"steps={steps}: give 0 (no pondering) or more")
        if start not in STARTS:
            raise unknown("start", start, STARTS)
        self.steps = steps
        self.slots_per_token = steps + 1
        self.feedback = Feedback("vocab", top_k)
        self.first_scale = max(1, steps) if start == "steps" else 1

    def bind(self, backbone: Backbone) -> None:
        """Refuses backbones whose states cannot be kept by depth."""
        if "linear_attention" in backbone.layer_types:
            raise UserError(
                f"{type(self).__name__} does not fit {backbone.config.model_type}: the states of its linear-attention "
                "layers cannot be kept by depth; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)

    def embed_scale(self, width: int) -> float:
        """The embedding multiplier that goes with mixtures."""
        return self.feedback.embed_scale(width)

    def new_cache(self, backbone: Backbone) -> DepthCache:
        """One sub-cache per pass in every layer."""
        return DepthCache(backbone.config.num_hidden_layers, self.slots_per_token)

    def begin(self, h_BTD: Tensor) -> Tensor:
        """E_0, from the token embeddings."""
        return h_BTD if self.first_scale == 1 else h_BTD * self.first_scale

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
        """See `Think.forward`. Without a cache, a pass is an ordinary causal one."""
        passes = None
        if isinstance(cache, DepthCache):
            passes = Passes(backbone, position_ids, cache, mask, h_BTD.shape[1], "same_depth")
        x_BTD, states = self.begin(h_BTD), []
        for depth in range(budget.passes(self.slots_per_token)):
            if depth:
                x_BTD = x_BTD + self.feedback(backbone, states[-1])
            if passes is None:
                states.append(backbone.step(x_BTD, None, mask, position_ids))
            else:
                states.append(passes.run_pass(depth, x_BTD, states[-1]) if depth else passes.run_first(x_BTD))
        if passes is not None:
            passes.finish()
        passes_BT = torch.full(h_BTD.shape[:2], len(states), device=h_BTD.device)
        return MethodOutput(states[-1], passes_BT, trace={"states": states} if self.record else {})

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. Rows are masked, never dropped, so no call is shortened by a sliding window."""
        shares = shares or [1] * self.slots_per_token
        return [*self.feedback.cost_schedule(tokens * sum(shares[1:])), *same_depth_passes(tokens, context, shares)]

"""PonderLM: repeated passes that add the embedding mixture predicted by one pass to the input of the next.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pondera.core.errors import UserError, unknown
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.passes import Passes, SlotCache, new_slot_cache, same_depth_passes
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker

STARTS = ("once", "steps")


class PonderLM(Think):
    """Runs s extra passes; before each one, adds the expected embedding of the predicted next token to the input.

    E_0 is the token embeddings. Pass i maps E_i to states H_i. The head maps H_i to probabilities, which mix the rows
    of the *input* embedding table into M_i, and E_{i+1} = E_i + M_i. The prediction uses the last pass. Nothing is
    detached, and only the last pass has a loss. A pass attends only to slots of its own depth. Training therefore runs
    s + 1 ordinary causal passes, and decoding with s + 1 caches computes the same function.

    Source: Pretraining language models to ponder in continuous space, arXiv 2505.20674, and the authors' public code.
    Cost: s + 1 passes and KV slots per token, the same in training and at inference, plus s times the head. Without
    `top_k`, also s times the mixture over the vocabulary; in a narrow model this costs as much as the passes.
    When not to use it: when KV memory is the bottleneck; on a character vocabulary, whose mixtures carry little
    information; on decoders with linear-attention layers (raises an error), because no cache here keeps their states
    per depth.
    Resolved: the paper mixes the 100 most likely tokens with renormalized probabilities; the authors' code mixes all
    tokens. The default follows the paper, ``top_k=None`` follows the code. E_0 is the embedding once, as in the paper's
    equation; ``start="steps"`` multiplies it by s, as in the authors' larger runs, under every budget. The mixed rows
    are scaled like the inputs: by sqrt(D) with ``init: scaled``, by 1 on pretrained backbones. Initialization is the
    same for all methods here; the authors' code divides weights into the residual stream by a further sqrt(s + 1). A
    smaller budget runs fewer passes. If calls on one cache use different budgets, a token keeps the keys and values of
    its last pass at the depths that it did not reach, as in `AdaPonderLM`.

    Args:
        steps: s, the number of extra passes; 0 gives the plain backbone.
        top_k: number of most likely tokens in the mixture, or ``None`` for the whole vocabulary; default: 100.
        start: ``"once"``: E_0 is the embedding; ``"steps"``: E_0 is s times the embedding.

    Example:
        >>> PonderLM(steps=1).cost_schedule(tokens=8)[-1]
        DecoderPass(queries=8, keys=8, cached=False, repeats=1)
    """

    paper: ClassVar[str] = "PonderLM, arXiv 2505.20674"
    cost: ClassVar[str] = "s+1 passes and KV slots, and s+1 heads, per token; training the same"
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
        self.needs_vocabulary = self.feedback.needs_vocabulary
        self.first_scale = max(1, steps) if start == "steps" else 1

    def bind(self, backbone: Backbone) -> None:
        """Raises if the cache cannot keep the backbone's states per depth."""
        if "linear_attention" in backbone.layer_types:
            raise UserError(
                f"{type(self).__name__} does not fit {backbone.config.model_type}: the states of its linear-attention "
                "layers cannot be kept per depth; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)

    def embed_scale(self, width: int) -> float:
        """The embedding multiplier for mixtures."""
        return self.feedback.embed_scale(width)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> SlotCache:
        """One sub-cache per pass in every layer."""
        return new_slot_cache(backbone, self.slots_per_token, kv_cache)

    def new_passes(self, backbone: Backbone, batch: TokenBatch, packed: bool = True) -> Passes:
        """The passes of a call, before the first one; `packed` as in `Passes`."""
        cache = batch.cache if isinstance(batch.cache, SlotCache) else self.new_cache(backbone)
        tokens = batch.h_BTD.shape[1]
        return Passes(backbone, batch.position_ids, cache, batch.mask, tokens, "same_depth", packed, batch.passes_BT)

    def begin(self, h_BTD: Tensor) -> Tensor:
        """E_0, computed from the token embeddings."""
        return h_BTD if self.first_scale == 1 else h_BTD * self.first_scale

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. Without a cache, each pass is an ordinary causal pass."""
        passes = self.new_passes(backbone, batch) if isinstance(batch.cache, SlotCache) else None
        x_BTD, states = self.begin(batch.h_BTD), []
        for depth in range(batch.budget.passes(self.slots_per_token)):
            if depth:
                x_BTD = x_BTD + self.feedback(backbone, states[-1])
            if passes is None:
                states.append(backbone.step(x_BTD, None, batch.mask, batch.position_ids))
            else:
                states.append(passes.run_pass(depth, x_BTD, states[-1]) if depth else passes.run_first(x_BTD))
        if passes is not None:
            passes.finish()
        passes_BT = torch.full(x_BTD.shape[:2], len(states), device=x_BTD.device)
        return MethodOutput(states[-1], passes_BT, trace={"states": states} if self.record else {})

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`. The cache masks slots and never drops them, so sliding windows save nothing."""
        shares = shares or [1] * self.slots_per_token
        return [*self.feedback.cost_schedule(tokens * sum(shares[1:])), *same_depth_passes(tokens, context, shares)]

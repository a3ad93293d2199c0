"""PonderLM-2: latent thoughts in separate KV slots, trained with Jacobi iteration.

Shapes: B batch, T tokens, D width; a token has slots 0 (its embedding) to K (its last thought).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.masks import has_documents
from pondera.cache.recurrent import kept_rows
from pondera.cache.token_cache import TokenCache
from pondera.core.errors import UserError
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.interleave import interleaved_cache, interleaved_pass, slots_allowed
from pondera.methods.think.common.jacobi import Rounds, check_rounds, jacobi, priced_rounds, rounds_of
from pondera.methods.think.common.train_rounds import checked_rounds, mean_rounds, rounds_at
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker


class PonderLM2(Think):
    """Before predicting the next token, the model generates K latent thoughts by feeding back its last hidden state.

    Every thought has its own KV slot at its token's position, and all later tokens attend to it. Thoughts depend on the
    thoughts of earlier tokens, so training cannot compute them from left to right. Training starts from a guess (each
    stage takes the states of the previous stage, in parallel over tokens) and refines it with a random number of Jacobi
    rounds; gradients flow through all of them. Each round makes at least one more token exact. Decoding is exact: K + 1
    calls of one slot.

    Source: PonderLM-2, arXiv 2509.23184, and the authors' public Llama code.
    Cost: K + 1 passes and K + 1 KV slots per token at inference; K(K+1)/2 + (R+1)(K+1) passes per token in training
    (K = 1, R in {2, 3}: 8 on average).
    When not to use it: when training compute is the bottleneck; `AdaptiveLatentCoT` needs a quarter of it.
    Resolved: hidden states are fed back unscaled if embeddings are at unit RMS, and RMS-matched otherwise (the paper
    does not describe pretrained backbones). Prefill and scoring refine until
    no thought of a sequence changes by more than a thousandth of the RMS of the embeddings, at most 64 times; the authors'
    code refines 3 times, which is far from the decoding model where thoughts matter. ``eval_rounds="exact"`` rolls out
    token by token. A call with several tokens on a filled cache always
    rolls out exactly. Sliding windows are K + 1 times wider, so that they span the same number of tokens.

    Args:
        thoughts: K, latent thoughts per token; 0 gives the plain backbone.
        train_rounds: Jacobi rounds in training: (minimum, maximum), drawn for each optimizer step; or a schedule of (share of
            the training, rounds), such as ``((0, 1), (0.3, 2), (0.7, 4))``, with which they grow.
        eval_rounds: Jacobi rounds at evaluation and prefill: a number, ``"converged"``, or ``"exact"``.
        feedback: ``"hidden"`` (the paper) or ``"vocab"``, the mixture of embeddings predicted by the state.

    Example:
        >>> PonderLM2(thoughts=1).cost_schedule(tokens=1, context=10)[-1]
        DecoderPass(queries=1, keys=22, cached=True, repeats=1)
    """

    paper: ClassVar[str] = "PonderLM-2, arXiv 2509.23184"
    cost: ClassVar[str] = "K+1 passes and KV slots per token; training K(K+1)/2 + (R+1)(K+1) passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "PonderLM2(thoughts=2, eval_rounds='exact', train_rounds=(2, 2))",
        "identity": "PonderLM2(thoughts=0)",
    }
    interleaved: ClassVar[bool] = True

    def __init__(
        self,
        thoughts: int = 1,
        train_rounds: Sequence = (2, 3),
        eval_rounds: int | str = "converged",
        feedback: str = "hidden",
    ) -> None:
        super().__init__()
        if thoughts < 0:
            raise UserError(f"thoughts={thoughts}: give 0 (no thinking) or more")
        check_rounds(eval_rounds)
        self.thoughts = thoughts
        self.train_rounds = checked_rounds(train_rounds)
        self.eval_rounds = eval_rounds
        self.slots_per_token = thoughts + 1
        self.feedback = Feedback(feedback)
        self.needs_vocabulary = self.feedback.needs_vocabulary
        self.begin_step(0, 0)

    def bind(self, backbone: Backbone) -> None:
        """Measures the feedback scale."""
        self.feedback.bind(backbone)

    def embed_scale(self, width: int) -> float:
        """The embedding multiplier for this feedback."""
        return self.feedback.embed_scale(width)

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """Draws the number of rounds for this optimizer step; all ranks and micro-batches use the same number."""
        self._rounds_now = rounds_at(self.train_rounds, step, seed, progress)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """One cache with K + 1 KV slots per token."""
        return interleaved_cache(backbone, self.slots_per_token, kv_cache)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. A smaller budget drops the last thoughts."""
        h_BTD, cache, mask, position_ids = batch.h_BTD, batch.cache, batch.mask, batch.position_ids
        slots = slots_allowed(self.slots_per_token, batch.budget, cache)
        started = cache is not None and (cache.tokens > 0 or h_BTD.shape[1] == 1)
        exact = not self.training and self.eval_rounds == "exact"
        residuals: list[float] = []
        if started or (exact and not has_documents(mask)):
            cache = cache if cache is not None else self.new_cache(backbone)
            cache.slots_per_token = slots
            states = self._roll_out(backbone, h_BTD, cache, mask, position_ids)
        else:

            def run(stages: list[Tensor]) -> list[Tensor]:
                return interleaved_pass(backbone, stages, mask, position_ids)

            watch = residuals if self.record else None
            unknowns = h_BTD.shape[1] * (slots - 1)
            rounds = Rounds(self._rounds_now) if self.training else rounds_of(self.eval_rounds, unknowns)
            real_BT = None if mask is None else mask > 0
            stages = jacobi(run, h_BTD, slots - 1, rounds, partial(self.feedback, backbone), watch, real_BT)
            states = interleaved_pass(backbone, stages, mask, position_ids, cache)
            if cache is not None:
                cache.record(_filled(h_BTD, slots))
        trace = {"states": states, "residuals": residuals} if self.record else {}
        return MethodOutput(states[-1], _filled(h_BTD, slots), trace=trace)

    def _roll_out(
        self, backbone: Backbone, h_BTD: Tensor, cache: TokenCache, mask: Tensor | None, position_ids: Tensor
    ) -> list[Tensor]:
        """The sequential definition: each token makes one call per slot, each of one slot, into one cache.

        The cache does not separate documents.
        """
        slots = cache.slots_per_token
        outputs: list[list[Tensor]] = [[] for _ in range(slots)]
        for token in range(h_BTD.shape[1]):
            x_B1D = h_BTD[:, token : token + 1]
            seen_BK = None
            if mask is not None:
                seen_BK = mask[:, : cache.tokens].repeat_interleave(slots, dim=1)
            cache.hold()
            with kept_rows(cache.layers, None if mask is None else mask[:, cache.tokens] > 0):
                for thought in range(slots):
                    if mask is not None and seen_BK is not None:
                        seen_BK = torch.cat([seen_BK, mask[:, cache.tokens : cache.tokens + 1]], dim=1)
                    state_B1D = backbone.step(x_B1D, cache.slots, seen_BK, position_ids[:, token : token + 1])
                    outputs[thought].append(state_B1D)
                    if thought < slots - 1:
                        x_B1D = self.feedback(backbone, state_B1D)
            cache.record(_filled(x_B1D, slots))
        return [torch.cat(states, dim=1) for states in outputs]

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`; for training, at the mean number of rounds, which may be fractional."""
        slots = len(shares or ()) or self.slots_per_token
        if not training and (context or tokens == 1 or self.eval_rounds == "exact"):
            return [DecoderPass(1, row + 1, cached=True) for row in range(context * slots, (context + tokens) * slots)]
        rounds = mean_rounds(self.train_rounds) if training else priced_rounds(self.eval_rounds)
        guess = [DecoderPass(tokens * n, tokens * n) for n in range(1, slots)]
        return [*guess, DecoderPass(tokens * slots, tokens * slots, repeats=(rounds if slots > 1 else 0) + 1)]


def _filled(h_BTD: Tensor, value: int) -> Tensor:
    return torch.full(h_BTD.shape[:2], value, device=h_BTD.device)

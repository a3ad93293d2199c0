"""AdaPonderLM: PonderLM whose tokens leave off one by one, and go on showing their last keys and values to the others.

Shapes: B batch, T tokens, N active tokens of all texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.cache.depth_cache import DepthCache
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput
from pondera.methods.think.common.halting import Halting, router
from pondera.methods.think.common.passes import Passes
from pondera.methods.think.ponder_lm import PonderLM
from pondera.models.backbone import Backbone

HALTED = ("freeze", "dense")


class AdaPonderLM(PonderLM):
    """PonderLM with a gate after each pass but the last: it weighs the update, and where it closes the token leaves off.

    A gate is a two-layer MLP of its own, g = sigmoid(MLP(h)). Tokens whose gate stays at or above `threshold` go on with
    E + g * M; the others never come back, and at all later passes their keys and values are those of their last one. At
    the threshold the update is next to nothing, so the hard cut is almost continuous. A penalty on the lowest gates alone
    pushes them down, so that the model chooses which tokens pay.

    Source: AdaPonderLM, arXiv 2603.01914; no public code.
    Cost: the passes taken, in training as at inference, each but the last with the gate's 8 D^2 FLOPs and each but the
    first with the head and mixture of `PonderLM`; s + 1 KV rows per token, whether it goes on or not.
    When not to use it: where the KV cache is what you are short of; from a `PonderLM` that never saw tokens leave off
    without training on; with gradient checkpointing, which cannot keep the sub-caches.
    Resolved: the first pass is everyone's, and before each of the s others stands a gate: a GELU MLP of inner width 4 D
    that says 0.99 of every token at first. The penalty is on the sigmoid, whose own gradient fades below the threshold, so
    logits are not clamped; it looks among the gates of active tokens of one micro-batch, so how a step is split decides a
    little which are the lowest. A token's prediction is read from its last pass, and its state stays as it was
    (``halted="freeze"``): in the paper's form the queries of a halted token still meet fresh keys of others, so what it is
    trained on is not what an engine would say that stopped there. ``halted="dense"`` is that form: every token runs every
    pass, and costs it, and effort moves the depth instead of the threshold.

    Args:
        steps: s, the most passes before the last one; 0 is the backbone itself.
        threshold: tau, the gate below which a token leaves off.
        top_k: how many of the likeliest tokens are mixed; none: all of them.
        penalty: lambda, what a fully open gate among the lowest costs in nats.
        bottom: k_max, the share of the gates that are penalised at the end of the ramp.
        ramp: (from, to), optimizer steps between which that share grows from 0 to `bottom`.
        halting: ``"gate"`` (the paper), or a control: ``"fixed"`` (which is `PonderLM`), ``"random"``, ``"oracle"``
            (`pondera.methods.think.common.halting`); controls add the mixture unweighted.
        continue_prob: ``"random"``: the share of tokens that take each further pass.
        halted: ``"freeze"`` or ``"dense"``.
        shared_gate: one MLP for all passes; in the paper it halts all tokens or none.
        start: as for `PonderLM`.

    Example:
        >>> AdaPonderLM(steps=1, halting="random").cost_schedule(tokens=8, shares=[1.0, 0.5])[1:]
        [DecoderPass(queries=8.0, keys=8, cached=False, repeats=1), DecoderPass(queries=4.0, keys=8, cached=False, repeats=1)]
    """

    paper: ClassVar[str] = "AdaPonderLM, arXiv 2603.01914"
    cost: ClassVar[str] = "mean passes taken, s+1 KV rows per token; training the same passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "AdaPonderLM(steps=3, top_k=9, threshold=0.3)",
        "identity": "AdaPonderLM(steps=0)",
        "exact-random": "AdaPonderLM(steps=2, top_k=None, halting='random')",
        "identity-random": "AdaPonderLM(steps=2, halting='random', continue_prob=0.0)",
        "exact-dense": "AdaPonderLM(steps=2, top_k=None, threshold=0.3, halted='dense')",
        "identity-dense": "AdaPonderLM(steps=0, halted='dense')",
    }
    supports_recompute: ClassVar[bool] = False

    def __init__(
        self,
        steps: int = 3,
        threshold: float = 1e-4,
        top_k: int | None = 100,
        penalty: float = 0.1,
        bottom: float = 0.1,
        ramp: tuple[int, int] = (100, 300),
        halting: str = "gate",
        continue_prob: float = 0.5,
        halted: str = "freeze",
        shared_gate: bool = False,
        start: str = "once",
    ) -> None:
        super().__init__(steps, top_k, start)
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: give a number between 0 and 1")
        if penalty < 0 or not 0 <= bottom <= 1:
            raise UserError(f"penalty={penalty}, bottom={bottom}: give 0 or more, and a share from 0 to 1")
        if len(ramp) != 2 or not 0 <= ramp[0] <= ramp[1]:
            raise UserError(f"ramp={ramp}: give (from step, to step), such as (100, 300)")
        if halted not in HALTED:
            raise unknown("halted", halted, HALTED)
        self.threshold, self.penalty, self.bottom, self.ramp = threshold, penalty, bottom, tuple(ramp)
        self.halting = Halting(halting, "gate", continue_prob)
        self.dense, self.shared_gate = halted == "dense", shared_gate
        self.adaptive = self.halting.adaptive and steps > 0 and not self.dense
        self.gates = nn.ModuleList()
        self._share_now = self._share(0)

    def bind(self, backbone: Backbone) -> None:
        """See `PonderLM.attach`; creates the gates."""
        super().bind(backbone)
        if self.halting.learned:
            count = min(1, self.steps) if self.shared_gate else self.steps
            self.gates.extend(mlp_gate(backbone, start=0.99) for _ in range(count))

    def begin_step(self, step: int, seed: int) -> None:
        """Sets how many of the gates are penalised; lets a random control draw anew."""
        self._share_now = self._share(step)
        self.halting.draw = 1 + step

    def _share(self, step: int) -> float:
        start, end = self.ramp
        return self.bottom * min(1.0, (step - start) / max(1, end - start)) if step > start else 0.0

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
        if not self.steps or not self.halting.adaptive:
            return super().forward(backbone, h_BTD, position_ids, cache, mask, budget)
        cache = cache if isinstance(cache, DepthCache) else self.new_cache(backbone)
        passes = Passes(
            backbone, position_ids, cache, mask, h_BTD.shape[1], "same_depth", self.packed and not self.dense
        )
        tau = budget.threshold(self.threshold) if self.adaptive else self.threshold
        x_BTD, said = self.begin(h_BTD), []
        states = [passes.run_first(x_BTD)]
        for depth in range(1, budget.passes(self.slots_per_token, self.adaptive and self.halting.learned)):
            gate_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.float32)
            if self.halting.learned:
                gate_BT = passes.of_active(self._gate(depth), states[-1])[..., 0]
                said.append((gate_BT, passes.active_BT))
                continue_BT = gate_BT >= tau
            else:
                predict = partial(_likeliest, backbone, states[-1])
                continue_BT = self.halting.continue_mask(depth, position_ids, labels_BT, predict)
            if not passes.mask_active(continue_BT) and not self.dense:
                break
            mixture_BTD = passes.of_active(partial(self.feedback, backbone), states[-1])
            x_BTD = x_BTD + gate_BT[..., None].to(x_BTD.dtype) * mixture_BTD
            states.append(passes.run_pass(depth, x_BTD, states[-1], everyone=self.dense))
        passes.finish()
        terms = {"thinking": self._penalty(said, passes)} if self.training and said else {}
        return MethodOutput(states[-1], passes.passes_BT, terms, trace={"states": states} if self.record else {})

    def _gate(self, depth: int) -> Callable[[Tensor], Tensor]:
        """From states to what the gate before `depth` says, ``[..., 1]`` from 0 to 1."""
        mlp = self.gates[0 if self.shared_gate else depth - 1]
        return lambda state_BTD: mlp(state_BTD).float().sigmoid()

    def _penalty(self, said: list[tuple[Tensor, Tensor | None]], passes: Passes) -> LossTerm:
        """The sum of the lowest gates of tokens that were active (none: all), so many of them as the ramp says."""
        real_BT = passes.real(torch.ones_like(passes.passes_BT, dtype=torch.bool))
        gates_N = torch.cat([gate_BT[real_BT if active_BT is None else active_BT] for gate_BT, active_BT in said])
        count = round(self._share_now * len(gates_N))
        return LossTerm(gates_N.topk(count, largest=False).values.sum(), max(1, count), self.penalty)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`."""
        shares = shares or [1] * self.slots_per_token
        made = super().cost_schedule(tokens, context, training, shares)
        weights = sum(p.numel() for p in self.gates[0].parameters() if p.ndim == 2) if self.gates else 0
        return [MatMul(tokens * sum(shares[:-1]), weights), *made] if weights else made


def mlp_gate(backbone: Backbone, start: float) -> nn.Sequential:
    """A two-layer MLP from states to a logit, which says the same for every token at first.

    Args:
        backbone: whose states it reads.
        start: the probability that it starts at, as a sigmoid.
    """
    weight, width = next(backbone.parameters()), backbone.config.hidden_size
    inner = nn.Linear(width, 4 * width, dtype=weight.dtype, device=weight.device)
    return nn.Sequential(inner, nn.GELU(), router(backbone, start, width=4 * width))


def _likeliest(backbone: Backbone, state_BTD: Tensor) -> Tensor:
    return backbone.head(state_BTD.detach()).argmax(-1)

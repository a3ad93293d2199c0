"""AdaPonderLM: tokens halt individually; later passes keep attending to their last keys and values.

Shapes: B batch, T tokens, N active tokens of all sequences, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, TokenBatch
from pondera.methods.think.common.halting import Halting, router
from pondera.methods.think.common.passes import Passes, SlotCache
from pondera.methods.think.common.ramp import Ramp, checked, height
from pondera.methods.think.ponder_lm import PonderLM
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker

HALTED = ("freeze", "dense")
RANKS = ("all", "pass")


class AdaPonderLM(PonderLM):
    """PonderLM with a learned gate before each extra pass: the gate scales the update and halts the token if it closes.

    Each gate is a two-layer MLP: g = sigmoid(MLP(h)). A token whose gate is at or above `threshold` continues with the
    input E + g * M. Every other token halts for good, and all later passes attend to the keys and values of its last
    pass. At the threshold the update is close to zero, so the hard cut is almost continuous. A penalty on only the
    lowest gates pushes them down, so the model chooses which tokens get more compute.

    Source: AdaPonderLM, arXiv 2603.01914; no public code.
    Cost: the passes that each token takes, the same in training and at inference. Each pass but the last adds the gate
    (8 D^2 FLOPs); each pass but the first adds the head and the mixture of `PonderLM`. A token uses s + 1 KV slots,
    whether it halts early or not.
    When not to use it: when KV memory is the bottleneck; on a `PonderLM` checkpoint trained without halting, unless you
    continue training; with gradient checkpointing, because checkpointing cannot keep the sub-caches.
    Resolved: all tokens take the first pass. Each of the s further passes has a gate, a GELU MLP of inner width 4 D
    that outputs 0.99 for every token at initialization. The penalty applies to the sigmoid, whose gradient vanishes
    below the threshold, so logits are not clamped. The lowest gates are selected among the active tokens of one
    micro-batch, so the split of a batch has a small effect on the selection. The prediction uses the state of the
    token's last pass, and a halted state stays frozen (``halted="freeze"``). In the paper's form the queries of a
    halted token still attend to new keys of other tokens, so training computes other states than an inference engine
    that stops there. ``halted="dense"`` is the paper's form: every token runs every pass at full cost, and effort sets
    the number of passes instead of the threshold, and does not combine with a KV-cache method (raises an error).

    Args:
        steps: s, the maximum number of extra passes; 0 gives the plain backbone.
        threshold: tau; a token halts if its gate is below this value.
        top_k: number of most likely tokens in the mixture, or ``None`` for the whole vocabulary; default: 100.
        penalty: lambda, the cost in nats of one fully open gate among the lowest.
        bottom: k_max, the share of gates that are penalized at the end of the ramp.
        ramp: (start, end), the shares of the training between which this share of gates grows from 0 to `bottom`.
        halting: ``"gate"`` (the paper), or a control: ``"fixed"`` (equal to `PonderLM`), ``"random"``, ``"oracle"``
            (`pondera.methods.think.common.halting`). Controls add the mixture with weight 1.
        continue_prob: for ``"random"``: the probability that a token takes the next pass.
        halted: ``"freeze"`` or ``"dense"``.
        shared_gate: use one MLP for all passes. According to the paper such a gate halts all tokens or none.
        start: see `PonderLM`.
        rank: ``"all"`` (the paper) penalizes the lowest gates of all passes together. One pass can then have all of
            them, and closes for every token. ``"pass"`` penalizes the lowest gates of each pass.

    Example:
        >>> AdaPonderLM(steps=1, halting="random").cost_schedule(tokens=8, shares=[1.0, 0.5])[-1]
        DecoderPass(queries=4.0, keys=8, cached=False, repeats=1)
    """

    paper: ClassVar[str] = "AdaPonderLM, arXiv 2603.01914"
    cost: ClassVar[str] = "mean passes taken, s+1 KV slots per token; training the same passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "AdaPonderLM(steps=3, top_k=9, threshold=0.3)",
        "identity": "AdaPonderLM(steps=0)",
        "exact-random": "AdaPonderLM(steps=2, top_k=None, halting='random')",
        "identity-random": "AdaPonderLM(steps=2, halting='random', continue_prob=0.0)",
        "exact-dense": "AdaPonderLM(steps=2, top_k=None, threshold=0.3, halted='dense')",
        "identity-dense": "AdaPonderLM(steps=0, halted='dense')",
    }
    supports_recompute: bool = False

    def __init__(
        self,
        steps: int = 3,
        threshold: float = 1e-4,
        top_k: int | None = 100,
        penalty: float = 0.1,
        bottom: float = 0.1,
        ramp: Ramp = (0.2, 0.6),
        halting: str = "gate",
        continue_prob: float = 0.5,
        halted: str = "freeze",
        shared_gate: bool = False,
        start: str = "once",
        rank: str = "all",
    ) -> None:
        super().__init__(steps, top_k, start)
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: give a number between 0 and 1")
        if penalty < 0 or not 0 <= bottom <= 1:
            raise UserError(f"penalty={penalty}, bottom={bottom}: give a penalty of 0 or more, and a share from 0 to 1")
        for name, given, allowed in (("halted", halted, HALTED), ("rank", rank, RANKS)):
            if given not in allowed:
                raise unknown(name, given, allowed)
        self.threshold, self.penalty, self.bottom, self.ramp = threshold, penalty, bottom, checked(ramp)
        self.halting = Halting(halting, "gate", continue_prob)
        self.dense, self.shared_gate, self.rank = halted == "dense", shared_gate, rank
        self.accepts_passes = not self.dense
        self.adaptive = self.halting.adaptive and steps > 0 and not self.dense
        self.gates = nn.ModuleList()
        self._share_now = bottom

    def bind(self, backbone: Backbone) -> None:
        """See `PonderLM.bind`; creates the gates."""
        super().bind(backbone)
        if self.halting.learned:
            count = min(1, self.steps) if self.shared_gate else self.steps
            self.gates.extend(mlp_gate(backbone, start=0.99) for _ in range(count))

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> SlotCache:
        """See `PonderLM.new_cache`.

        Raises:
            UserError: ``halted="dense"`` with a KV-cache method.
        """
        if kv_cache is not None and self.dense and self.steps:
            raise UserError(
                "AdaPonderLM(halted='dense') does not combine with a KV-cache method: its halted tokens attend without "
                "slots of their own, and a KV-cache method serves attention only together with new slots; use "
                "halted='freeze', or leave kv_cache out"
            )
        return super().new_cache(backbone, kv_cache)

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """Sets the share of penalized gates and the random draw of this step."""
        self._share_now = self.bottom * height(self.ramp, progress)
        self.halting.begin_step(step, seed)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. Training, prefill and decoding share this loop."""
        if not self.steps or (not self.halting.adaptive and batch.passes_BT is None):
            return super().forward(backbone, batch)
        batch = self.halting.keyed(batch)
        passes = self.new_passes(backbone, batch, self.packed and not self.dense)
        tau = batch.budget.threshold(self.threshold) if self.adaptive else self.threshold
        x_BTD, gate_history = self.begin(batch.h_BTD), []
        states = [passes.run_first(x_BTD)]
        for depth in range(1, batch.budget.passes(self.slots_per_token, self.adaptive and self.halting.learned)):
            gate_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.float32)
            if self.halting.learned:
                gate_BT = passes.of_active(self._gate(depth), states[-1])[..., 0]
                gate_history.append((gate_BT, passes.active_BT))
                continue_BT = gate_BT >= tau
            else:
                predict = partial(_likeliest, backbone, states[-1])
                continue_BT = self.halting.continue_mask(
                    depth, batch.position_ids, batch.labels_BT, predict, batch.prefix_BT
                )
            if not passes.mask_active(continue_BT) and not self.dense:
                break
            mixture_BTD = passes.of_active(partial(self.feedback, backbone), states[-1])
            x_BTD = x_BTD + gate_BT[..., None].to(x_BTD.dtype) * mixture_BTD
            states.append(passes.run_pass(depth, x_BTD, states[-1], everyone=self.dense))
        passes.finish()
        terms = {"thinking": self._penalty(gate_history, passes)} if self.training and gate_history else {}
        return MethodOutput(states[-1], passes.passes_BT, terms, trace={"states": states} if self.record else {})

    def _gate(self, depth: int) -> Callable[[Tensor], Tensor]:
        """Returns a function that maps states to the gate before `depth`, ``[..., 1]`` from 0 to 1."""
        mlp = self.gates[0 if self.shared_gate else depth - 1]
        return lambda state_BTD: mlp(state_BTD).float().sigmoid()

    def _penalty(self, gate_history: list[tuple[Tensor, Tensor | None]], passes: Passes) -> LossTerm:
        """The sum of the lowest gates of active tokens, the share of which grows on the ramp.

        Args:
            gate_history: for each pass, its gates and the tokens that were active before it; ``None``: all.
            passes: the passes of the call.
        """
        real_BT = passes.real(torch.ones_like(passes.passes_BT, dtype=torch.bool))
        by_pass = [gate_BT[real_BT if active_BT is None else active_BT] for gate_BT, active_BT in gate_history]
        lowest = []
        for gates_N in by_pass if self.rank == "pass" else [torch.cat(by_pass)]:
            count = round(self._share_now * len(gates_N))
            lowest.append(gates_N.topk(count, largest=False).values)
        lowest_N = torch.cat(lowest)
        return LossTerm(lowest_N.sum(), max(1, len(lowest_N)), self.penalty)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`."""
        shares = shares or [1] * self.slots_per_token
        schedule = super().cost_schedule(tokens, context, training, shares)
        weights = sum(p.numel() for p in self.gates[0].parameters() if p.ndim == 2) if self.gates else 0
        return [MatMul(tokens * sum(shares[:-1]), weights), *schedule] if weights else schedule


def mlp_gate(backbone: Backbone, start: float) -> nn.Sequential:
    """A two-layer MLP from states to one logit; the logit is the same for every token at initialization.

    Args:
        backbone: provides the width, dtype and device.
        start: the initial probability, sigmoid of the initial logit.
    """
    weight, width = next(backbone.parameters()), backbone.config.hidden_size
    inner = nn.Linear(width, 4 * width, dtype=weight.dtype, device=weight.device)
    return nn.Sequential(inner, nn.GELU(), router(backbone, start, width=4 * width))


def _likeliest(backbone: Backbone, state_BTD: Tensor) -> Tensor:
    return backbone.head(state_BTD.detach()).argmax(-1)

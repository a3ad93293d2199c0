"""PonderLM-3: PonderLM-2 with a learned router that sets the number of latent thoughts per token by weighting KV slots.

Shapes: B batch, T tokens, S slots of a call, N slots of a token, D width; a token has slots 0 (its embedding) to K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pondera.arch.dimensions import head_dim
from pondera.cache.depth_cache import slot_mask
from pondera.cache.key_bias import extra_coordinates
from pondera.cache.masks import SlotMask
from pondera.core.errors import UserError, unknown
from pondera.core.loss_terms import LossTerm
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.methods.think.base import MethodOutput, Think, TokenBatch
from pondera.methods.think.common.feedback import Feedback
from pondera.methods.think.common.halting import Halting, router
from pondera.methods.think.common.interleave import deinterleave, interleave, per_slot
from pondera.methods.think.common.jacobi import Rounds, check_rounds, jacobi, priced_rounds, rounds_of
from pondera.methods.think.common.passes import SlotCache, new_slot_cache
from pondera.methods.think.common.readout import mixture
from pondera.methods.think.common.train_rounds import checked_rounds, mean_rounds, rounds_at
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker
from pondera.models.varlen import VarlenPass, VarlenSlots

HALTING = ("router", "fixed", "random")
REFRESH = ("round", "once")


@dataclass
class New:
    """The new tokens of a call.

    Args:
        backbone: runs the passes.
        token_BT: token index within the sequence (padding counts).
        position_BT: position ids.
        real_BT: true for tokens that are not padding.
        mask: over cached and new tokens, see `Think.forward`.
        most: maximum number of slots per token.
        threshold: a slot is kept if the probability to reach it is at least this value.
        soft: run all slots, however small their weight.
        prefix_BT: see `TokenBatch`.
        chosen_BT: the slots that each token gets, whatever the router says; ``None``: the router decides.
    """

    backbone: Backbone
    token_BT: Tensor
    position_BT: Tensor
    real_BT: Tensor
    mask: Tensor | None
    most: int
    threshold: float
    soft: bool
    prefix_BT: Tensor | None = None
    chosen_BT: Tensor | None = None

    def at(self, token: int) -> New:
        """Selects one token."""
        parts = {
            "token_BT": self.token_BT,
            "position_BT": self.position_BT,
            "real_BT": self.real_BT,
            "prefix_BT": self.prefix_BT,
            "chosen_BT": self.chosen_BT,
        }
        return replace(self, **{name: x_BT[:, token : token + 1] for name, x_BT in parts.items() if x_BT is not None})

    def chosen(self) -> Tensor | None:
        """The slots that the caller chose, ``[B, T, N]``; ``None``: none."""
        if self.chosen_BT is None:
            return None
        return self.chosen_BT[..., None] > torch.arange(self.most, device=self.chosen_BT.device)


@dataclass
class Route:
    """The slots and weights of each token.

    Args:
        kept_BTN: true if the token has the slot; slot 0 exists for every token except padding.
        share_BTN: weight of the slot in the token's prediction; ``None``: the prediction uses the last slot only.
        log_weight_BTN: bias added to all attention scores of the slot; ``None``: no bias.
    """

    kept_BTN: Tensor
    share_BTN: Tensor | None = None
    log_weight_BTN: Tensor | None = None

    def passes(self) -> Tensor:
        """Slots per token, ``[B, T]``; padding, which is not run, counts as 1."""
        return self.kept_BTN.sum(-1).clamp(min=1)

    def slots(self, new: New, numbers: range) -> VarlenSlots:
        """The slots with the given numbers of all tokens, in causal order."""
        chosen = slice(numbers.start, numbers.stop)
        weight_BTN = None if self.log_weight_BTN is None else self.log_weight_BTN[..., chosen].flatten(1)
        token_BS, position_BS = (x_BT.repeat_interleave(len(numbers), 1) for x_BT in (new.token_BT, new.position_BT))
        return VarlenSlots(token_BS, position_BS, self.kept_BTN[..., chosen].flatten(1), weight_BTN)


class PonderLM3(Think):
    """PonderLM-2 with a router that reads a token's first state and decides how many latent thoughts the token gets.

    The router outputs a distribution s over 0..K thoughts. Slot k has weight w_k, the probability of k or more
    thoughts: log w_k is added to all attention scores of its key, so slots fade out before they are dropped. The
    prediction mixes the states of all slots with weights s. Training runs every slot, in parallel with Jacobi iteration
    as in `PonderLM2`. The router gets gradients through the mixture and through the attention weights; a penalty on the
    expected number of thoughts favors fewer thoughts. At inference, slots with a weight below `threshold` are neither
    run nor cached. The other slots keep their weights, also in the cache.

    Source: PonderLM-3, arXiv 2603.02023; no public code.
    Cost: 1 + (mean number of kept thoughts) passes and KV slots per token at inference; K(K+1)/2 + (R+1)(K+1) passes
    per token in training, independent of the kept thoughts (K = 3, R in {2, 3}: 20 on average).
    When not to use it: when training compute is the bottleneck; on decoders with linear-attention layers, whose state
    cannot weight a slot (raises an error); with gradient checkpointing, which would recompute passes without weights.
    Resolved: the router is one linear layer, initialized to probability 0.9 for K thoughts. Each Jacobi round uses the
    routing computed from the step-0 states of the previous round; the prediction uses the routing of the last pass. The
    weight of a slot also lowers the attention of its own token to it. Weights are clamped to at least `threshold`, and
    the mixture weights of the kept slots are renormalized to sum to one. If a round keeps a slot that the previous
    round did not run, the slot starts from the deepest state of the token. The penalty is lambda times the mean over
    tokens of w_1 + ... + w_K. Prefill drops slots too, and refines `eval_rounds` times like `PonderLM2`. Sliding
    windows count positions; those of `PonderLM2` count slots, so they can end within a token, where these end before
    it. In training, the weights are an extra coordinate of queries and keys (`pondera.cache.key_bias`), because no
    fused kernel propagates gradients through an additive mask.

    Args:
        thoughts: K, the maximum number of latent thoughts per token; 0 gives the plain backbone.
        threshold: tau; at inference a thought is generated if the probability to reach it is at least this value.
        train_rounds: Jacobi rounds in training: (minimum, maximum), drawn for each optimizer step; or a schedule of (share of
            the training, rounds), such as ``((0, 1), (0.3, 2), (0.7, 4))``, with which they grow.
        eval_rounds: Jacobi rounds at evaluation and prefill: a number, ``"converged"``, or ``"exact"``, token by token.
        penalty: lambda, the cost of one expected thought in nats.
        warmup: the share of the training in which the penalty grows from 0.
        halting: ``"router"`` (the paper), or a control with weights of 1 that predicts from the last state: ``"fixed"``
            (`PonderLM2`), ``"random"`` (`pondera.methods.think.common.halting`).
        continue_prob: for ``"random"``: the probability that a token gets the next thought.
        refresh: ``"round"`` routes again in every Jacobi round. ``"once"`` keeps the routing of the first pass, which
            saw no thoughts. The roll-out routes each token after earlier thoughts, so ``"once"`` does not train for it.

    Example:
        >>> PonderLM3(thoughts=1, halting="random").cost_schedule(tokens=1, context=10, shares=[1, 0.5])[-1]
        DecoderPass(queries=1, keys=17.0, cached=False, repeats=0.5)
    """

    paper: ClassVar[str] = "PonderLM-3, arXiv 2603.02023"
    cost: ClassVar[str] = "1 + mean thoughts kept passes and KV slots per token; training K(K+1)/2 + (R+1)(K+1) passes"
    examples: ClassVar[dict[str, str]] = {
        "exact": "PonderLM3(thoughts=2, threshold=0.1, train_rounds=(2, 2), eval_rounds='exact')",
        "identity": "PonderLM3(thoughts=0)",
        "exact-random": "PonderLM3(thoughts=2, halting='random', train_rounds=(2, 2), eval_rounds='exact')",
        "identity-random": "PonderLM3(thoughts=2, halting='random', continue_prob=0.0)",
    }
    drops_window_rows: ClassVar[bool] = False
    supports_recompute: bool = False
    accepts_passes: bool = True

    def __init__(
        self,
        thoughts: int = 3,
        threshold: float = 1e-4,
        train_rounds: Sequence = (2, 3),
        eval_rounds: int | str = "converged",
        penalty: float = 0.01,
        warmup: float = 0.3,
        halting: str = "router",
        continue_prob: float = 0.5,
        refresh: str = "round",
    ) -> None:
        super().__init__()
        if thoughts < 0:
            raise UserError(f"thoughts={thoughts}: give 0 (no thinking) or more")
        if not 0 < threshold < 1:
            raise UserError(f"threshold={threshold}: give a probability between 0 and 1")
        check_rounds(eval_rounds)
        if penalty < 0 or not 0 <= warmup <= 1:
            raise UserError(f"penalty={penalty}, warmup={warmup}: give a penalty of 0 or more, and a share from 0 to 1")
        for name, given, allowed in (("halting", halting, HALTING), ("refresh", refresh, REFRESH)):
            if given not in allowed:
                raise unknown(name, given, allowed)
        self.thoughts, self.threshold, self.eval_rounds, self.refresh = thoughts, threshold, eval_rounds, refresh
        self.train_rounds, self.penalty, self.warmup = checked_rounds(train_rounds), penalty, warmup
        self.slots_per_token = thoughts + 1
        self.feedback = Feedback("hidden")
        self.halting = Halting(halting, "router", continue_prob)
        self.adaptive = self.halting.adaptive and thoughts > 0
        self._wider = 0
        self.begin_step(0, 0)

    def bind(self, backbone: Backbone) -> None:
        """Raises if the backbone cannot weight slots; measures the feedback scale and creates the router."""
        if self.thoughts and "linear_attention" in backbone.layer_types:
            raise UserError(
                f"PonderLM3 does not fit {backbone.config.model_type}: the state of its linear-attention layers cannot "
                "weight or drop a slot; use PonderLM2(thoughts=1) on this backbone"
            )
        self.feedback.bind(backbone)
        if self.halting.learned and self.thoughts:
            self.router = router(backbone, start=0.5, outputs=self.slots_per_token)
            torch.nn.init.constant_(self.router.bias[-1:].detach(), math.log(0.9 / 0.1 * self.thoughts))
        self._wider = extra_coordinates(head_dim(backbone.config))

    def embed_scale(self, width: int) -> float:
        """The embedding multiplier for this feedback."""
        return self.feedback.embed_scale(width)

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """Draws the number of rounds (the same on all ranks), updates the penalty and the random draw of this step."""
        self._rounds_now = rounds_at(self.train_rounds, step, seed, progress)
        self._penalty_now = self.penalty * min(1.0, progress / self.warmup) if self.warmup else self.penalty
        self.halting.begin_step(step, seed)

    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> SlotCache:
        """One cache for the slots of all depths."""
        return new_slot_cache(backbone, 1, kv_cache)

    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """See `Think.forward`. Sequences may differ in their slots, so each call on a cache may have its own budget."""
        batch = self.halting.keyed(batch)
        h_BTD, cache, mask = batch.h_BTD, batch.cache, batch.mask
        seen, (rows, tokens) = 0 if cache is None else cache.tokens, h_BTD.shape[:2]
        position_BT = batch.position_ids.expand(rows, -1)
        new = New(
            backbone,
            torch.arange(seen, seen + tokens, device=h_BTD.device).expand(rows, -1),
            position_BT,
            torch.ones_like(position_BT, dtype=torch.bool) if mask is None else mask[:, seen : seen + tokens] > 0,
            mask,
            batch.budget.passes(self.slots_per_token, self.learned),
            batch.budget.threshold(self.threshold),
            soft=self.training and self.learned and cache is None and batch.passes_BT is None,
            prefix_BT=batch.prefix_BT,
            chosen_BT=batch.passes_BT,
        )
        cache = cache if isinstance(cache, SlotCache) else self.new_cache(backbone)
        residuals: list[float] = []
        if seen or not self.training and (tokens == 1 or self.eval_rounds == "exact"):
            states, route = self._roll_out(new, h_BTD, cache)
        else:
            states, route = self._iterate(new, h_BTD, cache, residuals)
        # Without a mixture the prediction uses the last state; tokens with fewer slots repeat their deepest state.
        out_BTD = states[-1] if route.share_BTN is None else mixture(states, list(route.share_BTN.unbind(-1)))
        terms = {} if route.log_weight_BTN is None or not new.soft else {"thinking": self._penalty(new, route)}
        trace = {"states": states, "residuals": residuals} if self.record else {}
        return MethodOutput(out_BTD, route.passes(), terms, trace=trace)

    def _iterate(self, new: New, h_BTD: Tensor, cache: SlotCache, residuals: list[float]) -> tuple[list[Tensor], Route]:
        """Processes all tokens in parallel with Jacobi rounds; each round uses the routing of the previous round."""
        route = self._route(new)

        def run(stages: list[Tensor]) -> list[Tensor]:
            nonlocal route
            states = self._pass(new, stages, route, self.new_cache(new.backbone))
            if len(stages) == 1 or self.refresh == "round":
                route = self._route(new, states[0])
            return states

        unknowns = h_BTD.shape[1] * (new.most - 1)
        rounds = Rounds(self._rounds_now) if self.training else rounds_of(self.eval_rounds, unknowns)
        watch = residuals if self.record else None
        stages = jacobi(run, h_BTD, new.most - 1, rounds, partial(self.feedback, new.backbone), watch, new.real_BT)
        states = self._pass(new, stages, route, cache)
        cache.record(route.passes())
        return states, route

    def _roll_out(self, new: New, h_BTD: Tensor, cache: SlotCache) -> tuple[list[Tensor], Route]:
        """The sequential definition: token by token, one call of one slot for each kept slot, into one cache."""
        states_per_token: list[list[Tensor]] = []
        routes: list[Route] = []
        for token, x_B1D in enumerate(h_BTD.split(1, dim=1)):
            now = new.at(token)
            ragged = VarlenPass(new.backbone, cache, new.mask, cache.tokens + 1, self.packed)
            states = [ragged.run(x_B1D, self._route(now).slots(now, range(1)))]
            route = self._route(now, states[0])
            for number in range(1, new.most):
                slots = route.slots(now, range(number, number + 1))
                thought_B1D = ragged.run(self.feedback(new.backbone, states[-1]), slots)
                states.append(torch.where(slots.wanted_BS[..., None], thought_B1D, states[-1]))
            cache.record(route.passes())
            states_per_token.append(states)
            routes.append(route)
        kept_BTN = torch.cat([route.kept_BTN for route in routes], dim=1)
        shares = [route.share_BTN for route in routes if route.share_BTN is not None]
        joined = Route(kept_BTN, torch.cat(shares, dim=1) if shares else None)
        return [torch.cat(states, dim=1) for states in zip(*states_per_token, strict=True)], joined

    def _pass(self, new: New, stages: list[Tensor], route: Route, cache: SlotCache) -> list[Tensor]:
        """One pass over the slots of all tokens; tokens without a slot repeat the state of the slot below."""
        if new.soft:
            return self._soft_pass(new, stages, route)
        kept_BTN = route.kept_BTN[..., : len(stages)]
        deepest = max(1, int(kept_BTN.flatten(0, 1).any(0).sum()))
        ragged = VarlenPass(new.backbone, cache, new.mask, new.token_BT.shape[1], self.packed)
        states = deinterleave(ragged.run(interleave(stages[:deepest]), route.slots(new, range(deepest))), deepest)
        for number in range(1, deepest):
            states[number] = torch.where(kept_BTN[..., number, None], states[number], states[number - 1])
        return states + states[-1:] * (len(stages) - deepest)

    def _soft_pass(self, new: New, stages: list[Tensor], route: Route) -> list[Tensor]:
        """One pass over all slots of all tokens, weighted."""
        count, backbone = len(stages), new.backbone
        x_BSD, slots = interleave(stages), route.slots(new, range(count))
        mask: Tensor | SlotMask | None = per_slot(new.mask, count)
        if count == 1:
            return [backbone.step(x_BSD, None, mask, slots.position_BS)]
        fused = self.packed and backbone.config._attn_implementation != "eager"
        windows = "sliding_attention" in backbone.layer_types
        if windows or not fused:
            order_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
            seen_1SS, token_BS = (order_S[:, None] >= order_S)[None], slots.token_BS
            weight_BS = None if fused else slots.log_weight_BS
            documents = None if new.mask is None else new.mask.long()
            mask = slot_mask(seen_1SS, token_BS, token_BS, documents, new.token_BT.shape[1], windows, weight_BS)
        weight_BS = slots.log_weight_BS if fused else None
        return deinterleave(backbone.step(x_BSD, None, mask, slots.position_BS, log_weight_BS=weight_BS), count)

    @property
    def learned(self) -> bool:
        """True if there is a router."""
        return self.halting.learned and self.thoughts > 0

    def _route(self, new: New, state_BTD: Tensor | None = None) -> Route:
        """Routes each token by its state at slot 0; without that state, every token has slot 0 only."""
        if state_BTD is None or new.most == 1:
            weight_BT1 = torch.zeros_like(new.real_BT, dtype=torch.float32)[..., None]
            return Route(new.real_BT[..., None], None, weight_BT1 if self.learned else None)
        if not self.learned:
            return Route(self._controlled(new))
        log_share_BTN = self.router(state_BTD).float().log_softmax(-1)
        log_weight_BTN = tail_masses(log_share_BTN)[..., : new.most]
        reached_BTN = new.chosen()
        if reached_BTN is None:
            reached_BTN = log_weight_BTN >= math.log(new.threshold)
        mixed_BTN = log_share_BTN[..., : new.most]
        if not new.soft:
            mixed_BTN = mixed_BTN.masked_fill(~reached_BTN, -math.inf)
        return Route(
            reached_BTN & new.real_BT[..., None],
            mixed_BTN.softmax(-1),
            log_weight_BTN.clamp(min=math.log(self.threshold)),
        )

    def _controlled(self, new: New) -> Tensor:
        """The slots of each token under a control, ``[B, T, N]``."""
        chosen_BTN = new.chosen()
        if chosen_BTN is not None:
            return chosen_BTN & new.real_BT[..., None]
        kept = [new.real_BT]
        for number in range(1, new.most):
            continue_BT = self.halting.continue_mask(number, new.position_BT, None, lambda: new.token_BT, new.prefix_BT)
            kept.append(kept[-1] if continue_BT is None else kept[-1] & continue_BT)
        return torch.stack(kept, dim=-1)

    def _penalty(self, new: New, route: Route) -> LossTerm:
        """The expected number of thoughts, summed over tokens."""
        assert route.log_weight_BTN is not None
        thoughts_BT = route.log_weight_BTN[..., 1:].exp().sum(-1)
        return LossTerm(thoughts_BT[new.real_BT].sum(), new.real_BT.sum(), self._penalty_now)

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """See `Think.slots`: skipped thoughts use no slots."""
        return tokens * (sum(shares) if shares else self.slots_per_token)

    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """See `Think.cost_schedule`; training uses the mean number of rounds, and a router runs every slot."""
        every, soft = [1.0] * self.slots_per_token, training and self.learned
        shares = [share for share in (every if soft else shares or every) if share]
        kept, routed = sum(shares), self.router.weight.numel() if self.learned else 0
        schedule: list[DecoderPass | MatMul] = []
        if not training and (context or tokens == 1 or self.eval_rounds == "exact"):
            for seen in range(context, context + tokens):
                schedule += [DecoderPass(1, seen * kept + k + 1, repeats=share) for k, share in enumerate(shares)]
            evaluations = 1.0
        else:
            rounds = mean_rounds(self.train_rounds) if training else priced_rounds(self.eval_rounds)
            wider = self._wider if soft else 0
            for number in range(1, len(shares)):
                rows = tokens * sum(shares[:number])
                schedule.append(DecoderPass(rows, rows, wider=wider if number > 1 else 0))
            evaluations = len(shares) - 1 + (rounds if len(shares) > 1 else 0)
            schedule.append(
                DecoderPass(tokens * kept, tokens * kept, repeats=evaluations - len(shares) + 2, wider=wider)
            )
        return [*schedule, MatMul(tokens * evaluations, routed)] if routed else schedule


def tail_masses(log_share_BTN: Tensor) -> Tensor:
    """Log of the probability of each index or higher, from the log of the probability of each; 0 at index 0.

    Example:
        >>> tail_masses(torch.tensor([0.5, 0.3, 0.2]).log()).exp()
        tensor([1.0000, 0.5000, 0.2000])
    """
    beyond = log_share_BTN.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., 1:]], dim=-1)

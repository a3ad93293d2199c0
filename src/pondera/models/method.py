"""What every method between embeddings and head promises, whichever seam it is on.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from pondera.cache.compressed_slots import CompressedSlotCache
from pondera.cache.token_cache import TokenCache
from pondera.core.effort import FULL, Effort
from pondera.core.hf import PreTrainedModel
from pondera.core.loss_terms import LossTerm
from pondera.cost.model import DecoderPass, MatMul
from pondera.models.backbone import Backbone


@dataclass
class MethodOutput:
    """What a method returns.

    Args:
        h_BTD: one state per token, ready for the head.
        passes_BT: passes that each token costs at inference.
        terms: loss terms of the method's own, by name.
        judge: further terms, which need what the head makes of the states: called with logits ``[B, T, V]`` and labels
            ``[B, T]`` where there are labels.
        trace: what a method found worth showing, when asked to record. ``"states"``: the states after each pass,
            ``[B, T, D]`` each; ``"residuals"``: the largest change in each round of refinement.
    """

    h_BTD: Tensor
    passes_BT: Tensor
    terms: dict[str, LossTerm] = field(default_factory=dict)
    deferred_loss: Callable[[Tensor, Tensor], dict[str, LossTerm]] | None = None
    trace: dict[str, Any] = field(default_factory=dict)


class SlotMaker(Protocol):
    """A KV-cache method, as methods between embeddings and head know it."""

    def slot_cache(self, model: PreTrainedModel, windowed: list[bool], slots_per_token: int) -> CompressedSlotCache:
        """See `pondera.methods.kv_cache.base.KVCacheMethod.slot_cache`."""
        ...

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> TokenCache:
        """See `pondera.methods.kv_cache.base.KVCacheMethod.token_cache`."""
        ...


class Method(nn.Module, ABC):
    """Makes states of embeddings with the backbone's layers, where one plain pass would not do.

    A method is constructed from its spec string, then attached to a backbone. It must be causal, and what it computes
    with a cache, with padding or in a batch must equal what it computes without; the contract tests check every file of
    its folder.

    Class attributes `paper` and `cost` say where it is from and what it costs in plain words (``pondera methods`` prints
    them).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests. ``"exact"``: what is computed piece by piece equals what is computed at
    once; ``"identity"`` (optional): the method does nothing. Further forms are named like ``"exact-random"``."""

    drops_window_rows: ClassVar[bool] = True
    """Its cache drops rows that have left a sliding window; false where they are kept and masked."""

    supports_recompute: ClassVar[bool] = True
    """Gradient checkpointing may run its passes again; false where a pass reads rows that an earlier one left."""

    unbounded_positions: ClassVar[bool] = False
    """It counts positions anew as it goes, so that a text may be longer than the backbone has positions for."""

    record: bool = False
    """Set it to have `MethodOutput.trace` filled with what the method finds worth showing."""

    slots_per_token: int = 1
    """KV rows that a token leaves in every layer."""

    def bind(self, backbone: Backbone) -> None:  # noqa: B027 (optional: a method without parameters needs none)
        """Creates what depends on the backbone (parameters, scales). Called once, before training or loading."""

    def embed_scale(self, width: int) -> float:
        """What ``init: scaled`` multiplies embeddings with, so that they enter at unit RMS."""
        return math.sqrt(2.5 * width)

    def begin_step(self, step: int, seed: int) -> None:  # noqa: B027 (optional: only randomised methods need it)
        """Told before each optimizer step, so that every rank and every part of a batch makes the same random choice."""

    def train(self, mode: bool = True) -> Self:
        """Leaving training, what was drawn for its last step is forgotten, so that a model in memory and on disk agree."""
        super().train(mode)
        if not mode:
            self.begin_step(-1, 0)
        return self

    @abstractmethod
    def new_cache(self, backbone: Backbone, kv_cache: SlotMaker | None = None) -> TokenCache:
        """An empty cache for this method on this backbone.

        Args:
            backbone: runs the passes.
            kv_cache: a KV-cache method that keeps the slots; default: all slots are kept as they are.
        """

    @abstractmethod
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
        """States of T new tokens.

        Args:
            backbone: runs the passes.
            h_BTD: token embeddings.
            position_ids: ``[B, T]`` or ``[1, T]`` token positions; all slots of a token share its own.
            cache: what came before; what the new tokens leave is added.
            mask: ``[B, seen + T]``, 0 = padding, else the number of the token's document (1 where there is but one);
                none: no padding.
            budget: how much thinking is wanted. A cache whose layout depends on it takes the budget of its first call.
            labels_BT: the token after each, where training or scoring knows it; negative where it does not. Only losses
                and controls may look.
        """

    @abstractmethod
    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """What processing `tokens` new tokens after `context` cached ones takes, for the price.

        Args:
            tokens: new tokens.
            context: cached ones.
            training: with the passes of training.
            shares: of the tokens that take each pass, as measured, from 1 downwards; none: every token takes all.
        """

    def at_budget(self, budget: Effort) -> Method | None:
        """What the price is of where so much is wanted and `shares` cannot say it: none where the backbone runs alone."""
        return self

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """KV rows that `tokens` tokens leave in every layer of the backbone; `shares` as for `cost_schedule`."""
        return tokens * self.slots_per_token

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """Bytes that its cache holds after `tokens` tokens beside those rows, for numbers of so many bytes."""
        return 0.0

    def passes(self) -> float:
        """Passes per token at inference, where every token takes all that it may."""
        return float(self.slots_per_token)

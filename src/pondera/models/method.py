"""Method: the base class of all methods between embeddings and head.

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
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.core.loss_terms import LossTerm
from pondera.core.spec_repr import SpecRepr
from pondera.cost.schedule import DecoderPass, MatMul
from pondera.models.backbone import Backbone

Terms = dict[str, LossTerm]
"""Loss terms by name."""

DeferredLoss = Callable[[Tensor, Tensor], Terms]
"""Computes loss terms from logits ``[B, T, V]`` and labels ``[B, T]``."""


@dataclass(frozen=True)
class TokenBatch:
    """The T new tokens of a call.

    Args:
        h_BTD: token embeddings.
        position_ids: ``[B, T]`` or ``[1, T]`` token positions; all KV slots of a token share its position.
        cache: the cache of earlier tokens; the new tokens are appended.
        mask: ``[B, seen + T]``, 0 = padding, else the number of the document (1 if there is only one); default: `None`, no
            padding.
        budget: compute per token. If the layout of the cache depends on it, the budget of the first call is used.
        labels_BT: the next token of each, negative if unknown. Only losses and controls may use it.
        ids_BT: the token ids; default: `None`, not known. Only random choices use them, so that they differ between tokens.
        passes_BT: the passes that each token takes, at most those of the method; default: `None`, the method decides.
        prefix_BT: a hash of the tokens of the document up to and including each, for random controls; default: `None`, not
            computed.
    """

    h_BTD: Tensor
    position_ids: Tensor
    cache: TokenCache | None = None
    mask: Tensor | None = None
    budget: Effort = FULL
    labels_BT: Tensor | None = None
    ids_BT: Tensor | None = None
    passes_BT: Tensor | None = None
    prefix_BT: Tensor | None = None


@dataclass
class MethodOutput:
    """Output of a method.

    Args:
        h_BTD: final hidden state of each token.
        passes_BT: passes of each token at inference.
        terms: loss terms of the method, by name.
        deferred_loss: computes further loss terms; called if there are labels.
        trace: records of the method, if `Method.record` is set. ``"states"``: the hidden states after each pass,
            ``[B, T, D]`` each; ``"residuals"``: the largest change in each Jacobi round.
    """

    h_BTD: Tensor
    passes_BT: Tensor
    terms: Terms = field(default_factory=dict)
    deferred_loss: DeferredLoss | None = None
    trace: dict[str, Any] = field(default_factory=dict)


class SlotMaker(Protocol):
    """A KV-cache method, as methods between embeddings and head know it."""

    def slot_cache(self, model: PreTrainedModel, windowed: list[bool], slots_per_token: int) -> CompressedSlotCache:
        """See `pondera.methods.kv_cache.base.KVCacheMethod.slot_cache`."""
        ...

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> TokenCache:
        """See `pondera.methods.kv_cache.base.KVCacheMethod.token_cache`."""
        ...


class Method(SpecRepr, nn.Module, ABC):
    """Computes hidden states from embeddings with the layers of a backbone, in place of one plain pass.

    A method is constructed from its spec string, then bound to a backbone. It must be causal, and its results must not depend
    on a cache, padding or batching; the contract tests check every file of its folder.

    The class attributes `paper` and `cost` name the source and the cost (``pondera methods`` prints them).
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    examples: ClassVar[dict[str, str]] = {}
    """Spec strings by name, for the contract tests. ``"exact"``: what is computed piece by piece equals what is computed at
    once; ``"identity"`` (optional): the method does nothing. Further forms are named like ``"exact-random"``."""

    drops_window_rows: ClassVar[bool] = True
    """The cache drops rows outside of a sliding window; false if it keeps and masks them."""

    supports_recompute: bool = True
    """Gradient checkpointing can recompute its passes; false if a pass reads KV slots of an earlier one."""

    unbounded_positions: ClassVar[bool] = False
    """Positions restart per block, so sequences may exceed `max_position_embeddings`."""

    accepts_passes: bool = False
    """True if the caller can choose the passes of each token, in place of the method's rule (`TokenBatch.passes_BT`)."""

    record: bool = False
    """If true, the method fills `MethodOutput.trace`."""

    slots_per_token: int = 1
    """KV slots per token in every layer."""

    def bind(self, backbone: Backbone) -> None:  # noqa: B027 (optional: a method without parameters needs none)
        """Creates parameters and scales that depend on the backbone. Called once, before training or loading."""

    def embed_scale(self, width: int) -> float:
        """The factor of the embeddings with ``init: scaled``, which gives them unit RMS."""
        return math.sqrt(2.5 * width)

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:  # noqa: B027 (optional)
        """Called before each optimizer step, so that all ranks and micro-batches make the same random choices.

        Args:
            step: the number of completed steps; -1 ends the choices of training.
            seed: the seed of the run.
            progress: the share of the training that is completed, for ramps; default: 1, the end of all ramps.
        """

    def train(self, mode: bool = True) -> Self:
        """Like `nn.Module`; eval mode also resets the random choices of the last step, which are not saved."""
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
    def forward(self, backbone: Backbone, batch: TokenBatch) -> MethodOutput:
        """Computes the hidden states of new tokens.

        Args:
            backbone: runs the passes.
            batch: the tokens.
        """

    @abstractmethod
    def cost_schedule(
        self, tokens: int, context: int = 0, training: bool = False, shares: Sequence[float] | None = None
    ) -> list[DecoderPass | MatMul]:
        """The decoder passes and matrix products for `tokens` new tokens after `context` cached ones.

        Args:
            tokens: number of new tokens.
            context: number of cached tokens.
            training: include passes that run in training only.
            shares: measured share of the tokens that run each pass, descending from 1; default: `None`, all tokens run all
                passes.
        """

    def at_budget(self, budget: Effort) -> Method | None:
        """The method whose cost applies at this budget, or `None` if only the backbone runs."""
        return self

    def slots(self, tokens: int, shares: Sequence[float] | None = None) -> float:
        """KV slots of `tokens` tokens in every layer of the backbone; `shares` as for `cost_schedule`."""
        return tokens * self.slots_per_token

    def extra_cache_bytes(self, tokens: int, number_bytes: int) -> float:
        """Bytes in the cache after `tokens` tokens in addition to KV slots, with `number_bytes` per number."""
        return 0.0

    def random_control(self, passes: float) -> Method | None:
        """The control of a learned rule: the same method, but random tokens take its passes.

        `pondera compare` trains it in addition to the method. What the method gains over it is due to the choice of the
        tokens.

        Args:
            passes: the mean passes per token that the control shall have.

        Returns:
            The control; `None` if the method does not learn which tokens take its passes.
        """
        return None

    def passes(self) -> float:
        """Maximum passes per token at inference."""
        return float(self.slots_per_token)


def check_passes(passes_BT: Tensor, h_BTD: Tensor, method: Method | None) -> None:
    """Checks the passes that a caller chose.

    Raises:
        UserError: the method has no passes to choose, or the tensor has another shape, type or a number below 1.
    """
    if method is None or not method.accepts_passes:
        who = "a model without a method runs" if method is None else f"{method!r} runs"
        raise UserError(f"passes: {who} the same number of passes for every token; leave it out")
    if passes_BT.shape != h_BTD.shape[:2] or passes_BT.is_floating_point():
        given = f"{passes_BT.dtype} {list(passes_BT.shape)}"
        raise UserError(f"passes: give integers of shape {list(h_BTD.shape[:2])}, one per token; got {given}")
    if passes_BT.numel() and int(passes_BT.min()) < 1:
        raise UserError(f"passes: each token takes at least 1 pass; got {int(passes_BT.min())}")

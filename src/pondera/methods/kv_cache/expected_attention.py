"""ExpectedAttention: keeps the tokens that future queries are expected to attend to.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, D head width, n future positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.moments import Moments
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy
from pondera.methods.kv_cache.common.query_rotation import QueryRotation


class ExpectedAttention(EvictionPolicy):
    """Question-agnostic prompt compression by the attention that queries after the prompt are expected to pay.

    Queries before their rotation are taken as normally distributed, with the mean m and the covariance C of the prompt's.
    R is their rotation to the next `future` positions, on average. A key k is then expected to get exp(k R m + k R C R' k / 2)
    before normalization, with queries scaled as in attention. Over all slots this gives weights, whose mean over the
    query heads of a KV head is multiplied by the norm of the slot's value.

    Source: Devoto et al., Expected Attention, arXiv 2510.00636, and the authors' code.
    Cost: a mean and a covariance per query head at the end of prefill, which takes about as many operations as attention
    to D tokens; no attention weights are read. Decoding computes no scores, but keeps every generated token.
    When not to use it: on models without rotary positions, which it refuses. For one question that the prompt ends with
    (`SnapKV`). For long outputs after short prompts.
    Resolved: as in the authors' code, first tokens (`sinks`) are in neither the statistics nor the normalization. Queries
    are rotated back by the number of their token in the sequence, so given position ids must be the usual ones. Score
    capping and learned sinks of a model do not enter the expectation. In chunked prefill the method evicts at the end of
    each chunk, with the queries of that chunk.

    Args:
        budget: KV slots of the prompt per layer and KV head: a number (512), a share of the prompt (0.25) or bytes of a
            sequence ("64MiB"); a list has one per layer, a list of lists one per head.
        future: number of positions after the prompt.
        epsilon: added to the weights before they are multiplied by the norms of values.
        sinks: number of first tokens that are never evicted.

    Example:
        >>> ExpectedAttention(budget=0.5, epsilon=0.02).sinks
        4
    """

    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    cost: ClassVar[str] = (
        "budget KV slots of the prompt and all generated tokens; mean and covariance of the prompt's queries"
    )
    examples: ClassVar[dict[str, str]] = {
        "exact": "ExpectedAttention(64)",
        "tight": "ExpectedAttention(8, future=4, epsilon=0.02, sinks=2)",
    }
    prefill_only: bool = True
    observation_window: int = ALL
    observes_scores: bool = False

    def __init__(
        self, budget: int | float | str | list = 0.5, future: int = 512, epsilon: float = 0.0, sinks: int = 4
    ) -> None:
        super().__init__(budget, sinks, recent=0)
        if isinstance(future, bool) or not isinstance(future, int) or future < 1:
            raise UserError(f"future={future!r}: give a number of positions, 1 or more")
        if not 0 <= epsilon < float("inf"):
            raise UserError(f"epsilon={epsilon}: give a number of 0 or more")
        self.future, self.epsilon = future, epsilon
        self.rotation: QueryRotation | None = None

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        self.rotation = QueryRotation.of(model, type(self).__name__, self.rotation)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        raise UserError(
            f"{type(self).__name__} rotates queries back by the numbers of their tokens, and a think method keeps several "
            "slots per token; use SnapKV(1024)"
        )

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: adds the queries, rotated back, to the statistics of the prompt."""
        assert self.rotation is not None
        number_BT = seen.number_T - layer.state["padding"][:, None]
        query_BGRTD = self.rotation.move(seen.query_BGRTD.float() * seen.scaling, -number_BT[:, None, None])
        moments = Moments.of(query_BGRTD, seen.real_BT & (number_BT >= self.sinks))
        if not seen.begins:
            moments = Moments(*(layer.state[name] for name in _names(table))).joined(moments)
        layer.state.update(zip(_names(table), moments, strict=True))

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`; uses up the statistics of the prompt."""
        assert self.rotation is not None
        moments = Moments(*(layer.state.pop(name) for name in _names(table)))
        first_B = layer.seen - layer.state["padding"]
        position_B11n = first_B[:, None, None, None] + torch.arange(self.future, device=first_B.device)
        mean_BGRD = self.rotation.average(moments.mean, position_B11n)
        covariance_BGRDD = moments.covariance()
        for _ in range(2):  # rows, then columns
            covariance_BGRDD = self.rotation.average(covariance_BGRDD, position_B11n[:, :, :, None]).mT
        keys_BGSD = table.keys.float()
        logit_BGRS = mean_BGRD @ keys_BGSD.mT
        for head in range(mean_BGRD.shape[2]):
            logit_BGRS[:, :, head] += ((keys_BGSD @ covariance_BGRDD[:, :, head]) * keys_BGSD).sum(-1) / 2
        later_BGS = table.position >= (layer.state["padding"] + self.sinks)[:, None, None]
        weight_BGRS = logit_BGRS.masked_fill(~later_BGS[:, :, None], -torch.inf).softmax(-1)
        weight_BGS = weight_BGRS.mean(2).masked_fill(~later_BGS, 0)  # NaN in sequences of padding
        return (weight_BGS + self.epsilon) * table.values.float().norm(dim=-1)


def _names(table: KVStore) -> list[str]:
    """The names in `KVStoreLayer.state` of the statistics of the queries of a store."""
    return [f"{field} {table.first_head}" for field in Moments._fields]

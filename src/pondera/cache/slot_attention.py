"""Grouped-query attention over KV slots, and the observations of it that a policy gets.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, D head width, K tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.native_evict import received_natively

BLOCK = 2**22
"""The largest number of scores per observation of a policy."""


@dataclass(frozen=True)
class Softmax:
    """The softmax of attention, with optional score capping and sink logits.

    Args:
        softcap: c in ``c * tanh(score / c)``, which replaces each score; default: `None`, no capping.
        sink_H: a learned sink logit per query head, which receives attention weight and has no value; default: `None`.
    """

    softcap: float | None = None
    sink_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the plain softmax, which kernels support."""
        return self.softcap is None and self.sink_H is None

    def capped(self, score: Tensor) -> Tensor:
        """Scores after capping, before the mask."""
        return score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)

    def weights(self, score_BGRTS: Tensor) -> Tensor:
        """Attention weights in float32 or wider; with the weight of the sink they sum to 1."""
        wide = torch.promote_types(score_BGRTS.dtype, torch.float32)
        if self.sink_H is None:
            return score_BGRTS.softmax(-1, dtype=wide)
        B, G, R, T, _ = score_BGRTS.shape
        sink_GR11 = self.sink_H.view(G, R, 1, 1).expand(B, G, R, T, 1)
        return torch.cat([score_BGRTS, sink_GR11.to(score_BGRTS.dtype)], -1).softmax(-1, dtype=wide)[..., :-1]

    def of(self, heads: slice, groups: int) -> Softmax:
        """The softmax for the query heads of some of the KV heads; `groups` is the number of all KV heads."""
        if self.sink_H is None or heads == slice(None):
            return self
        return Softmax(self.softcap, self.sink_H.view(groups, -1)[heads].flatten())


PLAIN = Softmax()


@dataclass(frozen=True)
class AttentionObservation:
    """Some queries of a call and their attention scores, as a policy observes them.

    Args:
        query_BGRTD: queries after rotary embedding.
        score_BGRTS: scaled dot products, ``-inf`` where a query may not attend; of no slot, if the policy needs none.
        number_T: the token index of each query.
        real_BT: false for queries of padding; their weights are 0.
        scaling: the factor of the dot products.
        begins: whether this is the first observation of a call.
        out_BTHD: the output of attention; default: `None`, not computed.
        softmax: the softmax that turns scores into weights.
        all_real: whether it is known that no query is padding.
    """

    query_BGRTD: Tensor
    score_BGRTS: Tensor
    number_T: Tensor
    real_BT: Tensor
    scaling: float
    begins: bool
    out_BTHD: Tensor | None = None
    softmax: Softmax = PLAIN
    all_real: bool = False

    @cached_property
    def weight_BGRTS(self) -> Tensor:
        """Attention weights in float32 or wider: with the sink they sum to 1 per query; those of padding queries are 0."""
        weight = self.softmax.weights(self.score_BGRTS)
        # The softmax of a query that may attend to no slot is NaN.
        return torch.where(self.real_BT[:, None, None, :, None], weight, 0)

    @property
    def received_BGS(self) -> Tensor:
        """``[B, G, S]``: the attention weights of each slot, summed over query heads and queries."""
        received_BGS = None
        if self.softmax is PLAIN and (self.all_real or bool(self.real_BT.all())):
            received_BGS = received_natively(self.score_BGRTS)
        return self.weight_BGRTS.sum((2, 3)) if received_BGS is None else received_BGS

    def some(self, queries: slice | Tensor, slots: int) -> AttentionObservation:
        """The observation of some of the queries, over `slots` slots; scores of later slots are ``-inf``.

        Args:
            queries: a slice, or indices.
            slots: the number of slots.
        """
        score_BGRTS = self.score_BGRTS[:, :, :, queries, :slots]
        if later := slots - score_BGRTS.shape[-1]:
            score_BGRTS = F.pad(score_BGRTS, (0, later), value=-torch.inf)
        return AttentionObservation(
            self.query_BGRTD[:, :, :, queries],
            score_BGRTS,
            self.number_T[queries],
            self.real_BT[:, queries],
            self.scaling,
            self.begins,
            softmax=self.softmax,
        )

    def rows(self, rows: Tensor) -> AttentionObservation:
        """The observation of these batch rows, in this order."""
        rows = rows.to(self.real_BT.device)
        return replace(
            self,
            query_BGRTD=self.query_BGRTD[rows],
            score_BGRTS=self.score_BGRTS[rows],
            real_BT=self.real_BT[rows],
            out_BTHD=None,
        )


def grouped(query_BHTD: Tensor, heads: int) -> Tensor:
    """``[B, H, T, D]`` -> ``[B, G, R, T, D]``: consecutive query heads share a KV head."""
    return query_BHTD.unflatten(1, (heads, query_BHTD.shape[1] // heads))


def slots_allowed(mask_B1TK: Tensor | None, position_BGS: Tensor) -> Tensor | None:
    """Converts a mask over tokens to a mask over KV slots, ``[B, G, T or 1, S]``; returns `None` if all slots are allowed.

    Args:
        mask_B1TK: true where a query may attend; `None`: every query may attend to all tokens.
        position_BGS: see `KVStore`; negative for slots that no query may attend to.
    """
    real_BGS = position_BGS >= 0
    if mask_B1TK is None:
        return None if bool(real_BGS.all()) else real_BGS[:, :, None]
    B, G, S = position_BGS.shape
    at_BGTS = position_BGS.clamp(min=0).long()[:, :, None].expand(B, G, mask_B1TK.shape[2], S)
    return mask_B1TK.expand(B, G, -1, -1).gather(3, at_BGTS) & real_BGS[:, :, None]


def slots_bias(bias_BK: Tensor, position_BGS: Tensor) -> Tensor:
    """Converts a key bias over tokens to one over KV slots, ``[B, G, 1, S]``.

    Args:
        bias_BK: the key bias of every token seen.
        position_BGS: see `KVStore`.
    """
    B, G, S = position_BGS.shape
    at_BGS = position_BGS.clamp(min=0).long()
    return bias_BK[:, None].expand(B, G, -1).gather(2, at_BGS)[:, :, None]


def attend(
    query_BGRTD: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softmax: Softmax = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention over KV slots, ``[B, T, H, D]``; the reference implementation of `attend_natively`.

    Args:
        query_BGRTD: queries by KV head.
        keys_BGSD, values_BGSD: the kept slots, in any order.
        allowed: ``[B, G, T or 1, S]``, true where a query may attend; `None`: everywhere.
        scaling: the factor of the dot products.
        softmax: the softmax that turns scores into weights.
        bias: see `slots_bias`; default: `None`, nothing is added.
    """
    B, G, R, T, D = query_BGRTD.shape
    if allowed is not None:
        # A query that may attend to no slot attends to all of them: a softmax over no slot would be NaN.
        allowed = (allowed | ~allowed.any(-1, keepdim=True)).expand(B, G, T, -1)
    if not softmax.plain or bias is not None:
        weight = softmax.weights(scores(query_BGRTD, keys_BGSD, allowed, scaling, softmax, bias)).to(values_BGSD.dtype)
        out = torch.matmul(weight.flatten(2, 3), values_BGSD)
        return out.unflatten(2, (R, T)).flatten(1, 2).transpose(1, 2).contiguous()
    if allowed is not None:
        allowed = allowed[:, :, None].expand(B, G, R, T, -1).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        query_BGRTD.flatten(2, 3), keys_BGSD, values_BGSD, attn_mask=allowed, scale=scaling
    )
    return out.unflatten(2, (R, T)).flatten(1, 2).transpose(1, 2).contiguous()


def scores(
    query_BGRTD: Tensor,
    keys_BGSD: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softmax: Softmax = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention scores ``[B, G, R, T, S]``: scaled dot products, ``-inf`` where a query may not attend."""
    score = torch.matmul(query_BGRTD.flatten(2, 3) * scaling, keys_BGSD.mT).unflatten(2, query_BGRTD.shape[2:4])
    score = softmax.capped(score)
    if bias is not None:
        score = score + bias[:, :, None].to(score.dtype)
    return score if allowed is None else score.masked_fill(~allowed[:, :, None], -torch.inf)


def attend_seen(seen: AttentionObservation, values_BGSD: Tensor) -> Tensor:
    """The output of attention, ``[B, T, H, D]``, from the weights of an observation."""
    if seen.out_BTHD is not None:
        return seen.out_BTHD
    R, T = seen.weight_BGRTS.shape[2:4]
    weight = seen.weight_BGRTS.to(values_BGSD.dtype).flatten(2, 3)
    return torch.matmul(weight, values_BGSD).unflatten(2, (R, T)).flatten(1, 2).transpose(1, 2).contiguous()

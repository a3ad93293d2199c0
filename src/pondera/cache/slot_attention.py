"""Attention over slots: the grouped form, which repeats no heads, and what a memory gets to see of it.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, D head width, K tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 2**22
"""Scores at a time, where a memory wants to see them."""


@dataclass(frozen=True)
class Softmax:
    """How scores become weights, beside the softmax itself.

    Args:
        softcap: scores are capped to ``softcap * tanh(score / softcap)``; `None`: they are not.
        sink_H: a learned score of each query head that takes its part of the weight and has no value; `None`: there is none.
    """

    softcap: float | None = None
    sink_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """There is nothing but the softmax, which kernels know."""
        return self.softcap is None and self.sink_H is None

    def capped(self, score: Tensor) -> Tensor:
        """Scores after the cap, before any mask."""
        return score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)

    def weights(self, score_BGRTS: Tensor) -> Tensor:
        """Weights in float32 at least, which sum to 1 with that of the sink."""
        wide = torch.promote_types(score_BGRTS.dtype, torch.float32)
        if self.sink_H is None:
            return score_BGRTS.softmax(-1, dtype=wide)
        B, G, R, T, _ = score_BGRTS.shape
        sink_GR11 = self.sink_H.view(G, R, 1, 1).expand(B, G, R, T, 1)
        return torch.cat([score_BGRTS, sink_GR11.to(score_BGRTS.dtype)], -1).softmax(-1, dtype=wide)[..., :-1]

    def of(self, heads: slice, groups: int) -> Softmax:
        """The same for the query heads of some of the KV heads."""
        if self.sink_H is None or heads == slice(None):
            return self
        return Softmax(self.softcap, self.sink_H.view(groups, -1)[heads].flatten())


PLAIN = Softmax()


@dataclass(frozen=True)
class AttentionObservation:
    """Some queries and what they looked at.

    Args:
        query_BGRTD: as the keys are, after rotary embedding.
        score_BGRTS: scaled products, ``-inf`` where a query may not look.
        number_T: the queries' token numbers.
        real_BT: false where a query is padding, which looks at nothing that counts.
        scaling: of the products.
        begins: these are the first queries that are shown of a call.
        out_BTHD: what attention gave, where it was found on the way.
        softmax: how scores become weights.
    """

    query_BGRTD: Tensor
    score_BGRTS: Tensor
    number_T: Tensor
    real_BT: Tensor
    scaling: float
    begins: bool
    out_BTHD: Tensor | None = None
    softmax: Softmax = PLAIN

    @cached_property
    def weight_BGRTS(self) -> Tensor:
        """Attention weights in float32 at least: every row sums to 1 with its sink, and is 0 of padding."""
        return self.weights(self.score_BGRTS)

    def weights(self, score_BGRTS: Tensor) -> Tensor:
        """Such weights from other scores."""
        weight = self.softmax.weights(score_BGRTS)
        # A query that may look nowhere has a softmax of NaN.
        return torch.where(self.real_BT[:, None, None, :, None], weight, 0)

    def first(self, queries: int, slots: int) -> AttentionObservation:
        """The first `queries` queries, over `slots` slots; they saw none that came later."""
        score_BGRTS = self.score_BGRTS[:, :, :, :queries, :slots]
        if later := slots - score_BGRTS.shape[-1]:
            score_BGRTS = F.pad(score_BGRTS, (0, later), value=-torch.inf)
        return AttentionObservation(
            self.query_BGRTD[:, :, :, :queries],
            score_BGRTS,
            self.number_T[:queries],
            self.real_BT[:, :queries],
            self.scaling,
            self.begins,
            softmax=self.softmax,
        )


def grouped(query_BHTD: Tensor, heads: int) -> Tensor:
    """``[B, H, T, D]`` -> ``[B, G, R, T, D]``: consecutive query heads share a KV head."""
    return query_BHTD.unflatten(1, (heads, query_BHTD.shape[1] // heads))


def slots_allowed(mask_B1TK: Tensor | None, position_BGS: Tensor) -> Tensor | None:
    """``[B, G, T, S]``: the columns of a mask over tokens that slots stand for; none: all of them.

    Args:
        mask_B1TK: which tokens each query may look at; none: every one that came before.
        position_BGS: see `SlotTable`; negative where there is nothing to look at.
    """
    real_BGS = position_BGS >= 0
    if mask_B1TK is None:
        return None if bool(real_BGS.all()) else real_BGS[:, :, None]
    B, G, S = position_BGS.shape
    at_BGTS = position_BGS.clamp(min=0).long()[:, :, None].expand(B, G, mask_B1TK.shape[2], S)
    return mask_B1TK.expand(B, G, -1, -1).gather(3, at_BGTS) & real_BGS[:, :, None]


def slots_bias(bias_BK: Tensor, position_BGS: Tensor) -> Tensor:
    """``[B, G, 1, S]``: what is added to the scores of each slot.

    Args:
        bias_BK: of every token seen.
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
    """Softmax attention, ``[B, T, H, D]``.

    Args:
        query_BGRTD: queries by KV head.
        keys_BGSD, values_BGSD: what is kept, in any order.
        allowed: ``[B, G, T or 1, S]``, or none.
        scaling: of the products.
        softmax: how scores become weights.
        bias: see `slots_bias`.
    """
    B, G, R, T, D = query_BGRTD.shape
    if allowed is not None:
        # A query of padding sees anything: a softmax over nothing would be NaN.
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
    """``[B, G, R, T, S]``: scaled products, ``-inf`` where a query may not look."""
    score = torch.matmul(query_BGRTD.flatten(2, 3) * scaling, keys_BGSD.mT).unflatten(2, query_BGRTD.shape[2:4])
    score = softmax.capped(score)
    if bias is not None:
        score = score + bias[:, :, None].to(score.dtype)
    return score if allowed is None else score.masked_fill(~allowed[:, :, None], -torch.inf)


def attend_seen(seen: AttentionObservation, values_BGSD: Tensor) -> Tensor:
    """Attention from weights that are there anyway, ``[B, T, H, D]``."""
    if seen.out_BTHD is not None:
        return seen.out_BTHD
    R, T = seen.weight_BGRTS.shape[2:4]
    weight = seen.weight_BGRTS.to(values_BGSD.dtype).flatten(2, 3)
    return torch.matmul(weight, values_BGSD).unflatten(2, (R, T)).flatten(1, 2).transpose(1, 2).contiguous()

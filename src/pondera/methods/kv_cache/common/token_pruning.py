"""Token pruning: a cache layer selects the tokens of a call that continue, and later layers see only those.

A cache layer can do so alone: it stores, attends with and shows the policy only the tokens that continue, and returns
zeros for the others. The hooks of `token_pruning_hooks.py` also keep decoder layers from computing the others; the
cache layers work in the same way.

Shapes: B batch, H query heads, G KV heads, T new tokens, k tokens that continue, K tokens seen and new, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pondera.cache.kv_store import EMPTY
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import Cache

MIN_TOKENS = 8
"""Minimum tokens kept per call: fewer saves nothing, and evaluation feeds 8 tokens at a time."""


@dataclass(frozen=True)
class Selector:
    """The tokens that continue in one call, in the order of the sequence.

    Args:
        position_Bk: their token numbers. Rows with fewer than k tokens begin with `kv_store.EMPTY`, so that all rows
            end with their last tokens.
        begin: number of tokens seen before the call.
        tokens: T, of the call.
        padding_B: number of padding tokens in the call.
        packed: whether decoder layers compute only the tokens that continue.
        present_BK: which of all tokens seen are visible; `None`: all slots of a layer. With a tensor, tokens of earlier
            calls may also continue.
    """

    position_Bk: Tensor
    begin: int
    tokens: int
    padding_B: Tensor
    packed: bool = False
    present_BK: Tensor | None = None

    @classmethod
    def all_of(cls, call: AttentionCall) -> Selector:
        """All tokens of a call except padding."""
        position_BT = call.position_BT
        padding_BT = position_BT < 0
        return cls(position_BT.masked_fill(padding_BT, EMPTY), call.start, call.tokens, padding_BT.sum(-1), packed=True)

    def rows(self, given: Tensor, dim: int) -> Tensor:
        """Gathers the entries of the tokens that continue.

        Args:
            given: a tensor with one entry per token of the call.
            dim: dimension of the tokens; the first dimension is the batch, or 1.
        """
        wide = given.expand(len(self.position_Bk), *given.shape[1:])
        return wide.gather(dim, self._index(wide, dim))

    def mask(self, given_B1TK: Tensor | None) -> Tensor | None:
        """``[B, 1, k, K]``: the tokens that they may attend to; `None`: all earlier tokens in the slots of a layer.

        Args:
            given_B1TK: the mask of the call.
        """
        if self.present_BK is None:
            return None if given_B1TK is None else self.rows(given_B1TK, 2)
        if self.begin == 0 and given_B1TK is None:
            return None  # the layers contain only visible tokens
        column_K = torch.arange(self.present_BK.shape[1], device=self.position_Bk.device)
        return ((column_K <= self.position_Bk[..., None]) & self.present_BK[:, None])[:, None]

    def put_back(self, rows_Bk: Tensor) -> Tensor:
        """``[B, T, ...]``: scatters the entries to their tokens of the call; zeros for all other tokens."""
        nothing_Bk = (self.position_Bk < self.begin).view(*self.position_Bk.shape, *[1] * (rows_Bk.ndim - 2))
        rows_Bk = rows_Bk.masked_fill(nothing_Bk.to(rows_Bk.device), 0)
        rows_BT = rows_Bk.new_zeros(len(rows_Bk), self.tokens, *rows_Bk.shape[2:])
        return rows_BT.scatter_add(1, self._index(rows_Bk, 1), rows_Bk)

    def _index(self, like: Tensor, dim: int) -> Tensor:
        """The indices of the tokens within the call, in the shape for `gather` and `scatter_add`."""
        place_Bk = (self.position_Bk - self.begin).clamp(min=0)
        shape = [len(place_Bk), *[1] * (like.ndim - 1)]
        shape[dim] = place_Bk.shape[1]
        wide = list(like.shape)
        wide[dim] = place_Bk.shape[1]
        return place_Bk.view(shape).expand(wide).to(like.device)


@dataclass
class PrunedCall(AttentionCall):
    """A call with only the tokens that continue. `start` is such that the last query has its own token number.

    Args:
        choice: the tokens that continue.
    """

    choice: Selector = field(kw_only=True)

    @classmethod
    def of(cls, call: AttentionCall, choice: Selector) -> PrunedCall:
        """Prunes a call; with packed tokens, its queries, keys and values already contain only those that continue."""
        query, key, value = (
            rows if choice.packed else choice.rows(rows, 2)
            for rows in (call.query_BHTD, call.key_BGTD, call.value_BGTD)
        )
        return cls(
            call.module,
            query,
            key,
            value,
            choice.mask(call.mask_B1TK),
            call.scaling,
            choice.begin + choice.tokens - choice.position_Bk.shape[1],
            call.further,
            call.base,
            choice=choice,
        )

    @property
    def position(self) -> Tensor:
        """See `AttentionCall`: the tokens that continue need not be the latest."""
        return self.position_BT

    @property
    def in_order(self) -> bool:
        """See `AttentionCall`: true in the first call, unless it has a mask."""
        return self.choice.begin == 0 and self.mask_B1TK is None

    @property
    def position_BT(self) -> Tensor:
        """See `AttentionCall`."""
        return self.choice.position_Bk.to(self.query_BHTD.device)

    @property
    def padding_B(self) -> Tensor | int:
        """See `AttentionCall`: padding does not continue, but counts."""
        return self.choice.padding_B.to(self.query_BHTD.device)

    def mask(self, part: slice) -> Tensor | None:
        """See `AttentionCall`: always a tensor, as these queries are not consecutive."""
        if self.mask_B1TK is not None:
            return super().mask(part)
        column_K = torch.arange(self.start + self.tokens, device=self.query_BHTD.device)
        return (column_K <= self.position_BT[:, part, None])[:, None]


class SelectorLayer(KVStoreLayer):
    """A layer that selects the tokens that continue; a policy may do so in `Policy.evict_layer`.

    Attributes:
        choice: the tokens that continue in the running call; `None`: all.
        new_BT: positions of the call's tokens, while the layer processes the call.
        packs: whether later decoder layers skip the other tokens.
        rotary: rotary embedding of the tokens that continue, while later decoder layers run.
    """

    choice: Selector | None = None
    new_BT: Tensor | None = None
    packs: bool = False
    rotary: tuple[Tensor, ...] = ()

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`."""
        self.choice, self.new_BT = None, call.position_BT
        out_BTHD = super().attend(call)
        self.new_BT = None
        return out_BTHD

    def lead(self, h_BTD: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Prunes the hidden states between this decoder layer and the next.

        Args:
            h_BTD: output of the decoder layer.
            rotary: rotary embedding of the call's tokens, ``[B or 1, T, r]`` each.
        """
        assert self.choice is not None
        self.rotary = tuple(self.choice.rows(part_BTr, 1) for part_BTr in rotary)
        return self.choice.rows(h_BTD, 1)

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.choice = self.new_BT = None
        self.rotary = ()


class PrunedLayer(KVStoreLayer):
    """A layer after a selecting layer: it stores only the tokens that continue.

    Attributes:
        chooser: the selecting layer of the same cache; `None`: no earlier layer selects.
    """

    chooser: SelectorLayer | None = None

    @property
    def led(self) -> Selector | None:
        """The tokens of the running call that reach this layer; `None`: all."""
        return None if self.chooser is None else self.chooser.choice

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `KVLayer.update`: counts all tokens of the call as seen, including pruned ones."""
        output = super().update(key_states, value_states, *args, **kwargs)
        if self.chooser is not None:
            self.seen = self.chooser.seen
        return output

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`; pruned tokens attend to nothing, and get zeros."""
        choice = self.led
        if choice is None:
            return super().attend(call)
        if choice.packed and call.tokens != choice.position_Bk.shape[1]:
            raise UserError("this cache belongs to another model; create one for this model: method.cache(model)")
        self.prompt = self.seen
        out_BkHD = super().attend(PrunedCall.of(call, choice))
        if not self.record_past:
            self.evicted_until = self.seen
        for table in self.tables:
            table.whole = False
        return out_BkHD if choice.packed else choice.put_back(out_BkHD)


def link(cache: Cache) -> None:
    """Gives each layer after a selecting layer a reference to the nearest one before it."""
    chooser = None
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer):
            layer.chooser = chooser
        if isinstance(layer, SelectorLayer):
            chooser = layer

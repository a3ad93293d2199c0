"""Variable number of KV slots per token, packed in causal order: x1 z1 z1' x2 x3 z3 ...

A sequence stores its KV slots in causal order, so each slot attends to all slots before it. Slots that a token does not have
are not computed and not stored.

Shapes: B batch, T tokens, S slots of a call, N computed rows, K stored slots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pondera.cache.columns import FREE
from pondera.cache.compressed_slots import CompressedSlotCache
from pondera.cache.depth_cache import DepthCache, DepthWrite, slot_mask
from pondera.cache.masks import SlotMask, has_documents
from pondera.cache.packing import PackedRows
from pondera.models.backbone import Backbone


@dataclass
class VarlenSlots:
    """The candidate KV slots of a call, in causal order.

    Args:
        token_BS: index of the token of each slot in its sequence (including padding).
        position_BS: position of the token.
        wanted_BS: bool, which slots exist.
        log_weight_BS: bias on the attention scores of the slot, in this and later calls; default: `None`, no bias.
    """

    token_BS: Tensor
    position_BS: Tensor
    wanted_BS: Tensor
    log_weight_BS: Tensor | None = None


class VarlenPass:
    """Runs new KV slots after those in a cache.

    Args:
        backbone: runs the pass.
        cache: cache of one depth with the earlier slots; new ones are appended.
        mask: ``[B, T]`` token mask over cached and new tokens, as for `Think.forward`.
        tokens: T, cached and new tokens.
        packed: run only the slots that exist. Otherwise all slots run and the others are masked, which is the reference
            implementation in the tests.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: DepthCache | CompressedSlotCache,
        mask: Tensor | None,
        tokens: int,
        packed: bool = True,
    ) -> None:
        self.backbone, self.cache, self.tokens, self.packed = backbone, cache, tokens, packed
        self.mask_BT = None if mask is None else mask[:, :tokens].long()
        self._by_position = "sliding_attention" in backbone.layer_types
        self._one_text = not has_documents(mask)

    def run(self, x_BSD: Tensor, slots: VarlenSlots) -> Tensor:
        """Hidden states of input vectors, ``[B, S, D]``; values at slots that do not exist are undefined."""
        if isinstance(self.cache, CompressedSlotCache):
            return self._compressed(self.cache, x_BSD, slots)
        rows = PackedRows.where(slots.wanted_BS)
        if rows.width == 0 and self.packed:
            return x_BSD
        everyone = rows.even and rows.width == x_BSD.shape[1]
        if not self.packed or (everyone and self._depths.is_aligned(0)):
            return self._dense(x_BSD, slots)
        return self._packed(x_BSD, slots, rows)

    def _compressed(self, cache: CompressedSlotCache, x_BSD: Tensor, slots: VarlenSlots) -> Tensor:
        """The wanted slots, without padding, kept by a KV-cache method."""
        batch = len(x_BSD)
        token_BS, position_BS, wanted_BS = (
            each.expand(batch, -1) for each in (slots.token_BS, slots.position_BS, slots.wanted_BS)
        )
        if self.mask_BT is not None:
            wanted_BS = wanted_BS & (self.mask_BT.gather(1, token_BS.clamp(min=0)) > 0)
        rows = (token_BS, position_BS, 0, "causal", slots.log_weight_BS)
        return cache.run(self.backbone.step, x_BSD, wanted_BS, *rows)

    def _dense(self, x_BSD: Tensor, slots: VarlenSlots) -> Tensor:
        """Runs all slots; every sequence gets the same number of columns."""
        before = self._depths.width(0)
        query_BS = torch.where(slots.wanted_BS, slots.token_BS, FREE)
        self._depths.append_metadata(0, query_BS, slots.log_weight_BS)
        column_1S = torch.arange(before, self._depths.width(0), device=x_BSD.device)[None]
        mask = None if self._plain() else self._mask(query_BS, column_1S)
        with self._depths.writing(DepthWrite(0, range(1))) as store:
            return self.backbone.step(x_BSD, store, mask, slots.position_BS)

    def _packed(self, x_BSD: Tensor, slots: VarlenSlots, rows: PackedRows) -> Tensor:
        """Runs existing slots only; they follow the last slot of their sequence."""
        wanted_BS, before = slots.wanted_BS, self._depths.width(0)
        token_N = slots.token_BS[wanted_BS]
        weight_N = None if slots.log_weight_BS is None else slots.log_weight_BS[wanted_BS]
        column_N = self._depths.allocate(0, rows, token_N, weight_N)
        order_N = before + rows.order_N if column_N is None else column_N
        query_BS = rows.pad(token_N[None] - FREE) + FREE  # `FREE` if a sequence has fewer rows
        mask = None if rows.batch == 1 and self._plain() else self._mask(query_BS, rows.pad(order_N[None]))
        write = DepthWrite(0, range(1), rows, column_N, self._depths.width(0))
        with self._depths.writing(write) as store:
            new_1ND = self.backbone.step(x_BSD[wanted_BS][None], store, mask, slots.position_BS[wanted_BS][None], rows)
        return torch.zeros_like(x_BSD).index_put(wanted_BS.nonzero(as_tuple=True), new_1ND[0].to(x_BSD.dtype))

    @property
    def _depths(self) -> DepthCache:
        return cast(DepthCache, self.cache)

    def _plain(self) -> bool:
        """Whether the plain causal mask of the backbone is correct: one document, no free column, no slot whose token became
        padding, and no slot bias or at most one slot per token."""
        held = self._depths.depths[0]
        assert held is not None
        if not self.packed or not self._one_text:
            return False
        unseen_BC = held.token_BC == FREE
        if self.mask_BT is not None:
            unseen_BC = unseen_BC | (self.mask_BT.gather(1, held.token_BC.clamp(min=0)) == 0)
        if bool(unseen_BC.any()):
            return False
        if held.log_weight_BC is None and not self._by_position:
            return True
        return bool((held.token_BC.diff(dim=1) > 0).all())

    def _mask(self, query_BS: Tensor, column_BS: Tensor) -> SlotMask:
        held = self._depths.depths[0]
        assert held is not None
        order_K = torch.arange(self._depths.width(0), device=query_BS.device)
        return slot_mask(
            order_K <= column_BS[..., None],
            query_BS,
            held.token_BC,
            self.mask_BT,
            self.tokens,
            self._by_position,
            held.log_weight_BC,
        )

"""Storage for KV slots that are stored as codes: those of a prompt that were kept.

Shapes: B batch, G KV heads, S slots, n slots to code, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Parts
from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.state import BatchState

AFTER = 2**30
"""Added to the position of a slot that is not coded, so that it is sorted after those that are."""


@dataclass(eq=False)
class CodedSlots(BatchState):
    """The codes of some slots of a store, in the order of the sequence.

    Args:
        keys, values: the codes.
        position_BGS: int32, as in `KVStore`; `EMPTY` for an entry that only pads a head with fewer slots.
    """

    keys: Parts
    values: Parts
    position_BGS: Tensor

    @classmethod
    def take(cls, table: KVStore, codable_BGS: Tensor, codecs: tuple[Codec, Codec]) -> Self:
        """Moves slots of a store into codes: as many of the codable ones, from the first on, as fill whole units.

        The other slots stay in the store. The slots of a unit are those of one head of one batch row, so they do not depend on
        other rows.

        Args:
            table: the store; padding slots are removed from it.
            codable_BGS: which of its slots may be coded.
            codecs: of keys and of values; each codes heads alike.
        """
        unit = max(codec.unit for codec in codecs)
        position_BGS, real_BGS = table.position, table.real
        count_BG, total_BG = codable_BGS.sum(-1) // unit * unit, real_BGS.sum(-1)
        last = torch.iinfo(torch.int32).max
        sorted_BGS = torch.where(codable_BGS, position_BGS, position_BGS + AFTER).masked_fill(~real_BGS, last)
        order_BGS = sorted_BGS.argsort(-1)
        n = int(count_BG.max())
        number_n = torch.arange(n, device=order_BGS.device)
        first_BGn = order_BGS[..., :n]
        taken = [rows.gather(2, first_BGn[..., None].expand(*first_BGn.shape, rows.shape[-1])) for rows in table.rows]
        position_BGn = torch.where(number_n < count_BG[..., None], position_BGS.gather(2, first_BGn), EMPTY)
        keys, values = (codec.encode(rows, None) if n else {} for codec, rows in zip(codecs, taken, strict=True))
        rest_BGk = count_BG[..., None] + torch.arange(int((total_BG - count_BG).max()), device=order_BGS.device)
        left_BGk = rest_BGk < total_BG[..., None]
        table.keep(order_BGS.gather(2, rest_BGk.clamp(max=order_BGS.shape[-1] - 1)), left_BGk)
        return cls(keys, values, position_BGn.to(torch.int32))

    def joined(self, table: KVStore, codecs: tuple[Codec, Codec]) -> KVStore:
        """A store with the decoded slots and those of `table`, for one call of attention.

        Args:
            table: the store from which the slots were taken; it has the slots of later tokens, too.
            codecs: those that coded the slots.
        """
        if not self.keys:
            return table
        parts = zip(codecs, (self.keys, self.values), table.rows, strict=True)
        keys, values = (torch.cat([codec.decode(part, None).to(rows.dtype), rows], 2) for codec, part, rows in parts)
        position_BGS = torch.cat([self.position_BGS, table.position], 2)
        return KVStore(keys, values, position_BGS, used=keys.shape[2], whole=False, first_head=table.first_head)

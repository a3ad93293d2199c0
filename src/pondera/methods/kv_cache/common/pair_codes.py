"""Product codes of keys before rotary embedding: each byte codes some whole rotation pairs of a head.

Whole pairs commute with the rotary embedding, so decoding looks numbers up and rotates them; no matrix product is needed. A
coordinate that the model does not rotate is a unit of its own.

Shapes: B batch, G KV heads, S tokens, D head width, c coordinates of all heads (G * D), U units, K codes, n bytes of a
token in a layer, W coordinates of the widest group, N vectors (B * S).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Parts
from pondera.cache.native_sections import PAIRS, WIDEST, Rows

WORD = 4
"""The bytes that the kernel reads at once."""


class PairCodes(Codec):
    """Product codes of one layer's keys before rotary embedding.

    Args:
        table_GKD: the rows of all groups; coordinate d of a decoded key is ``table[head, code of d's group, d]``.
        byte_GD: the number of the byte that codes each coordinate, from 0 over all heads of the layer.
        weight_GD: weights of the squared errors by which codes are chosen.

    Example:
        >>> table = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])  # one head, two codes for one pair
        >>> codec = PairCodes(table, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
        >>> parts = codec.encode(torch.tensor([[[[0.9, 1.8]]]]), None)
        >>> parts["codes"].tolist(), codec.decode(parts, None).tolist()
        ([[[[1]]]], [[[[1.0, 2.0]]]])
    """

    def __init__(self, table_GKD: Tensor, byte_GD: Tensor, weight_GD: Tensor) -> None:
        G, K, D = table_GKD.shape
        self.heads, self.width, self.codes = G, D, K
        flat = byte_GD.flatten()  # coordinates of all heads one after another
        self.byte_c = flat
        self.rows = table_GKD.transpose(1, 2).reshape(G * D, K).float()
        self.halves = table_GKD.transpose(1, 2).contiguous() if table_GKD.dtype == torch.float16 else None
        self.bytes = int(flat.max()) + 1
        self.pairs: tuple[Tensor, Tensor] | None = None
        W = int(torch.bincount(flat).max())
        # For each byte the coordinates that it codes; the number G * D stands for an additional coordinate that is zero.
        self.of_nW = torch.full((self.bytes, W), G * D, device=flat.device)
        for number in range(self.bytes):
            members = (flat == number).nonzero()[:, 0]
            self.of_nW[number, : len(members)] = members
        scale_c = torch.cat([weight_GD.flatten().float().sqrt(), weight_GD.new_zeros(1, dtype=torch.float32)])
        rows_cK = torch.cat([self.rows, self.rows.new_zeros(1, K)])
        self.scale_c = scale_c
        self.scaled_nWK = (rows_cK * scale_c[:, None])[self.of_nW]
        self.half_nK = self.scaled_nWK.square().sum(1) / 2

    def entry(self, name: str) -> int:
        """See `Codec.entry`."""
        return 1

    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None = None) -> Parts:
        """See `Codec.encode`; the keys are those before rotary embedding."""
        B, _, S, _ = x_BGSD.shape
        x_cN = x_BGSD.float().permute(1, 3, 0, 2).reshape(-1, B * S)
        x_cN = torch.cat([x_cN, x_cN.new_zeros(1, B * S)]) * self.scale_c[:, None]
        codes_nN = torch.empty(self.bytes, B * S, dtype=torch.uint8, device=x_cN.device)
        for number, (of_W, rows_WK, half_K) in enumerate(zip(self.of_nW, self.scaled_nWK, self.half_nK, strict=True)):
            codes_nN[number] = torch.addmm(half_K, x_cN[of_W].T, rows_WK, beta=-1).argmax(-1).to(torch.uint8)
        return {"codes": codes_nN.view(self.bytes, B, 1, S).permute(1, 2, 3, 0).contiguous()}

    def kernel_rows(self, parts: Parts, first: Sequence[int] | None, keys: bool = False) -> Rows | None:
        """See `Codec.kernel_rows`; with float16 tables."""
        codes_B1Sn = parts["codes"]
        if self.halves is None or type(codes_B1Sn) is not Tensor or codes_B1Sn.device.type != "cpu":
            return None
        if self.halves.device.type != "cpu" or codes_B1Sn.stride(3) != 1 or self.width > WIDEST:
            return None
        step_B, _, step_S, _ = codes_B1Sn.stride()
        found = Rows(PAIRS, codes_B1Sn.data_ptr(), None, None, step_B, 0, step_S)
        found.table[0], found.order, found.K = self.halves.data_ptr(), self.byte_c.data_ptr(), self.codes
        return found

    def add_pairs(self, rows: Rows, interleaved: bool) -> bool:
        """Adds tables of whole rotation pairs, from which the kernel computes scores without rows; false if bytes split pairs.

        Args:
            rows: those of `kernel_rows`, with the number of pairs.
            interleaved: whether a pair is two neighbours, not one coordinate of each half.
        """
        if self.halves is None or self.bytes < WORD:
            return False
        if self.pairs is None:
            self.pairs = self._paired(rows.P, interleaved)
        table, units = self.pairs
        if not len(table):
            return False
        rows.pair_table, rows.pair_units = table.data_ptr(), units.data_ptr()
        rows.pair_count, rows.token_bytes = units.shape[1], self.bytes
        return True

    def _paired(self, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
        """Tables ``[G, U, K, 2]`` and, of each unit, both coordinates and the byte; empty if bytes split pairs."""
        assert self.halves is not None
        step = 1 if interleaved else pairs
        one_U = [p * (2 if interleaved else 1) for p in range(pairs)]
        rest = range(2 * pairs, self.width)
        unit_U2 = torch.tensor([[one, one + step] for one in one_U] + [[one, -1] for one in rest])
        byte_GD = self.byte_c.view(self.heads, self.width)
        one_U, other_U = unit_U2.unbind(1)
        single_U = other_U < 0
        other_U = torch.where(single_U, one_U, other_U)
        if not torch.equal(byte_GD[:, one_U], byte_GD[:, other_U]):
            return torch.empty(0), torch.empty(0)
        table_GDK = self.halves.view(self.heads, self.width, self.codes)
        table_GUK2 = torch.stack([table_GDK[:, one_U], table_GDK[:, other_U].masked_fill(single_U[:, None], 0)], -1)
        units_GU3 = torch.cat([unit_U2.expand(self.heads, -1, -1), byte_GD[:, one_U, None]], -1)
        return table_GUK2.contiguous(), units_GU3.contiguous()

    def decode(self, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.decode`; returns keys before rotary embedding."""
        codes_B1Sn = parts["codes"]
        B, _, S, _ = codes_B1Sn.shape
        codes_cM = codes_B1Sn.reshape(B * S, -1).T.long()[self.byte_c]
        x_cM = self.rows.gather(1, codes_cM)
        return x_cM.view(self.heads, self.width, B, S).permute(2, 0, 3, 1)


def deal_bytes(variance_LGd: Tensor, total: int, least: int, most: int, bits: float = 8) -> Tensor:
    """``[L, G]``: the bytes of each head, by reverse water-filling with one level for all heads.

    A coordinate of (weighted) variance v gets ``max(0, log2(v / level) / 2)`` bits. The level is the one at which all heads
    together get `total` bytes.

    Args:
        variance_LGd: weighted variances of the coordinates of each head.
        total: bytes of a token in all layers.
        least, most: bounds of the bytes of one head.
        bits: of a byte that are used: log2 of the number of codes.

    Example:
        >>> deal_bytes(torch.tensor([[[65536.0, 65536.0], [1.0, 1.0]]]), total=6, least=1, most=5).tolist()
        [[4, 2]]
    """
    heads = variance_LGd.shape[0] * variance_LGd.shape[1]
    assert least * heads <= total <= most * heads
    logs = variance_LGd.clamp(min=1e-30).log2().double()
    low, high = logs.min() - 64, logs.max() + 1
    for _ in range(80):
        level = (low + high) / 2
        if ((logs - level).clamp(min=0).sum(-1) / (2 * bits)).clamp(least, most).sum() > total:
            low = level
        else:
            high = level
    wanted_LG = ((logs - high).clamp(min=0).sum(-1) / (2 * bits)).clamp(least, most)
    dealt_LG = wanted_LG.floor()
    for _ in range(total - int(dealt_LG.sum())):  # what rounding left over, to those that lost most
        rest = torch.where(dealt_LG < most, wanted_LG - dealt_LG, -torch.inf)
        dealt_LG.view(-1)[rest.argmax()] += 1
    return dealt_LG.long()


def grouped_units(variance_U: Tensor, size_U: Tensor, groups: int, bits: float = 8) -> list[list[int]]:
    """Puts units of similar variance together, so that each group wants about as many bits.

    Args:
        variance_U: the weighted variance of the coordinates of each unit: a rotation pair, or a coordinate that is not rotated.
        size_U: the coordinates of each unit.
        groups: the number of groups, at most the number of units.
        bits: of a group.

    Example:
        >>> grouped_units(torch.tensor([1.0, 1000.0, 1.0, 1.0]), torch.tensor([2, 2, 2, 2]), groups=2)
        [[1], [0, 2, 3]]
    """
    order = variance_U.argsort(descending=True, stable=True).tolist()
    logs, size_U = variance_U.clamp(min=1e-30).log2().double(), size_U / 2
    low, high = logs.min() - 64, logs.max() + 1
    for _ in range(80):  # the level at which the units together want the bits of all groups
        level = (low + high) / 2
        if (size_U * (logs - level).clamp(min=0)).sum() > bits * groups:
            low = level
        else:
            high = level
    wanted = (size_U * (logs - high).clamp(min=0.05)).tolist()
    found, left = [], sum(wanted)
    for number in range(groups, 0, -1):
        members, target = [], left / number
        while order and (
            not members or (len(order) >= number and (sum(wanted[j] for j in members) + wanted[order[0]] / 2 <= target))
        ):
            members.append(order.pop(0))
        if number == 1:
            members += order
        found.append(members)
        left -= sum(wanted[j] for j in members)
    return found

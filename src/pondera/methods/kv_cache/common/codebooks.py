"""Residual codebooks: vectors as sums of codebook vectors, and attention on codes without decoding.

Shapes: B batch, G KV heads, H heads of codes (G, or 1 if one vector joins all KV heads), J = G / H, S tokens,
D head width, N queries of a KV head, L stages, K codes of a stage, C dimensions of a branch within a head, M = H * S.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pondera.cache.codec import Codec, Parts
from pondera.cache.native_sections import BLOCK, COLUMNS, RESIDUAL, WIDEST, Rows
from pondera.methods.kv_cache.common.lut_attention import look_up, sum_by_code
from pondera.methods.kv_cache.common.pair_codes import PairCodes
from pondera.models.rotary import rotate_by_position

ONE_BYTE, TWO_BYTES = 2**8, 2**15
"""Number of codes that fit into uint8, and into int16."""


class Codebooks(Codec):
    """Residual codebooks of one layer, for its keys or its values.

    A vector is the sum of one codebook vector per stage. Branches split the dimensions of a head and have stages of
    their own, for example for high and low rotary frequencies. Codes are one tensor ``codes``, ``[B, H, S, L]`` with
    the stages of all branches in order, uint8 for up to 256 codes and int16 for up to 32,768; so a token of a head
    takes exactly L or 2 L bytes.

    Args:
        tables: codebooks of each branch, ``[stages, K, J * C]``.
        dims: dimensions of a head that each branch codes.
        heads: G.
        joined: J, the number of KV heads in one vector.

    Example:
        >>> table = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])  # two stages of two codes
        >>> codec = Codebooks([table], [torch.arange(2)], heads=1)
        >>> parts = codec.encode(torch.tensor([[[[3.9, 1.1]]]]), None)
        >>> parts["codes"].tolist(), codec.decode(parts, None).tolist()
        ([[[[1, 1]]]], [[[[4.0, 1.0]]]])
    """

    queries = 16  # measured: for more queries, a matrix product with decoded vectors is faster

    def __init__(self, tables: list[Tensor], dims: list[Tensor], heads: int, joined: int = 1) -> None:
        self.dims, self.heads, self.joined = dims, heads, joined
        self.tables = [table.to(torch.promote_types(table.dtype, torch.float32)) for table in tables]
        self.halves = [table.square().sum(-1) / 2 for table in self.tables]
        self.codes = self.tables[0].shape[1]
        self.dtype = torch.uint8 if self.codes <= ONE_BYTE else torch.int16
        self.given = tables
        order_D = torch.cat(dims)
        in_order = bool((order_D == torch.arange(len(order_D), device=order_D.device)).all())
        self.order_D = None if in_order else order_D.contiguous()
        self.columns: list[Tensor] = []

    @property
    def stages(self) -> int:
        """L, summed over branches."""
        return sum(len(table) for table in self.tables)

    def entry(self, name: str) -> int:
        """See `Codec.entry`."""
        return 1

    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None = None) -> Parts:
        """See `Codec.encode`: each stage codes the residual of the stages before by its nearest codebook vector."""
        codes = []
        for table_LKC, half_LK, dims_C in zip(self.tables, self.halves, self.dims, strict=True):
            x_BHSC = self._joint(x_BGSD[..., dims_C]).to(table_LKC.dtype)
            rest_MC = x_BHSC.flatten(0, 2)
            codes_LM = torch.empty(len(table_LKC), len(rest_MC), dtype=torch.int64, device=rest_MC.device)
            for stage, (table_KC, half_K) in enumerate(zip(table_LKC, half_LK, strict=True)):
                codes_LM[stage] = torch.addmm(half_K, rest_MC, table_KC.T, beta=-1).argmax(-1)
                rest_MC = rest_MC - table_KC[codes_LM[stage]]
            codes.append(codes_LM.T.view(*x_BHSC.shape[:3], -1))
        return {"codes": torch.cat(codes, -1).to(self.dtype)}

    def decode(self, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.decode`."""
        codes_BHSL = parts["codes"]
        B, H, S, _ = codes_BHSL.shape
        D = sum(len(dims) for dims in self.dims)
        x_BGSD = self.tables[0].new_empty(B, self.heads, S, D)
        for table_LKC, dims_C, codes_BHSl in self._branches(codes_BHSL):
            index = _index(codes_BHSl.flatten(0, 2), table_LKC.shape[1])
            rows_MC = functional.embedding_bag(index, table_LKC.flatten(0, 1), mode="sum")
            x_BGSD[..., dims_C] = self._apart(rows_MC.view(B, H, S, -1))
        return x_BGSD

    def dot(self, query_BGND: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.dot`: sums, per token, the looked-up products of each query with the token's codebook vectors."""
        N, codes_BHSL = query_BGND.shape[2], parts["codes"]
        H = codes_BHSL.shape[1]
        score_BGNS = None
        for table_LKC, dims_C, codes_BHSl in self._branches(codes_BHSL):
            rows_KJC = table_LKC.flatten(0, 1).unflatten(-1, (self.joined, -1))
            query_BHJNC = query_BGND[..., dims_C].to(rows_KJC.dtype).unflatten(1, (H, self.joined))
            product = torch.einsum("kjc,bhjnc->bhkjn", rows_KJC, query_BHJNC).flatten(3)
            scores = look_up(product, codes_BHSl).unflatten(2, (self.joined, N)).flatten(1, 2)
            score_BGNS = scores if score_BGNS is None else score_BGNS + scores
        assert score_BGNS is not None
        return score_BGNS

    def mix(self, weight_BGNS: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.mix`: sums the weights per code, and multiplies these sums with the codebooks."""
        B, G, N, _ = weight_BGNS.shape
        codes_BHSL = parts["codes"]
        D = sum(len(dims) for dims in self.dims)
        out_BGND = self.tables[0].new_empty(B, G, N, D)
        weight_BHJNS = weight_BGNS.to(self.tables[0].dtype).unflatten(1, (-1, self.joined))
        weight_BHnS = weight_BHJNS.flatten(2, 3)
        for table_LKC, dims_C, codes_BHSl in self._branches(codes_BHSL):
            rows_KJC = table_LKC.flatten(0, 1).unflatten(-1, (self.joined, -1))
            received = sum_by_code(weight_BHnS, codes_BHSl, table_LKC.shape[1]).unflatten(3, (self.joined, N))
            out_BGND[..., dims_C] = torch.einsum("bhkjn,kjc->bhjnc", received, rows_KJC).flatten(1, 2)
        return out_BGND

    def kernel_rows(self, parts: Parts, first: Sequence[int] | None = None, keys: bool = False) -> Rows | None:
        """See `Codec.kernel_rows`; with float16 tables of at most two branches, and a vector per head."""
        codes_BHSL = parts["codes"]
        if self.joined > 1 or self.dtype != torch.uint8 or len(self.given) > 2 or codes_BHSL.stride(3) != 1:
            return None
        for rows in (codes_BHSL, *self.given):
            if (
                type(rows) is not Tensor
                or rows.device.type != "cpu"
                or not (rows is codes_BHSL or rows.is_contiguous())
            ):
                return None
        if any(table.dtype != torch.float16 for table in self.given):
            return None
        found = Rows(RESIDUAL, codes_BHSL.data_ptr(), None, None, *codes_BHSL.stride()[:3])
        for branch, (table, dims_C) in enumerate(zip(self.given, self.dims, strict=True)):
            found.table[branch] = table.data_ptr()
            found.stages[branch], found.width[branch] = len(table), len(dims_C)
        found.K, found.order = self.codes, None if self.order_D is None else self.order_D.data_ptr()
        if keys:
            for branch, columns_LCK in enumerate(self._columns()):
                found.columns[branch], found.column_count = columns_LCK.data_ptr(), columns_LCK.shape[2]
        return found

    def _columns(self) -> list[Tensor]:
        """The tables as columns ``[stages, C, K or more]``, by which the kernel multiplies queries; made at first use."""
        if not self.columns:
            rest = -self.codes % COLUMNS
            self.columns = [functional.pad(table.mT, (0, rest)).contiguous() for table in self.given]
        return self.columns

    def _branches(self, codes_BHSL: Tensor) -> zip:
        return zip(self.tables, self.dims, codes_BHSL.split([len(t) for t in self.tables], -1), strict=True)

    def _joint(self, x_BGSC: Tensor) -> Tensor:
        """``[B, G, S, C]`` -> ``[B, H, S, J * C]``."""
        return x_BGSC.unflatten(1, (-1, self.joined)).transpose(2, 3).flatten(3)

    def _apart(self, x_BHSJC: Tensor) -> Tensor:
        """``[B, H, S, J * C]`` -> ``[B, G, S, C]``."""
        return x_BHSJC.unflatten(3, (self.joined, -1)).transpose(2, 3).flatten(1, 2)


class RotaryCodebooks(Codec):
    """Codes of keys before rotary embedding, by another codec; decoding applies the rotary embedding again.

    Args:
        of: the other codec.
        frequency_P: radians per position.
        interleaved: see `rotate`.
        angles: those of the frequencies, which layers can share; default: `None`, its own.
    """

    needs_position = True

    def __init__(self, of: Codec, frequency_P: Tensor, interleaved: bool = False, angles: Angles | None = None) -> None:
        self.of, self.frequency_P, self.interleaved = of, frequency_P, interleaved
        self.angles = Angles(frequency_P) if angles is None else angles
        self.unit = of.unit

    def entry(self, name: str) -> int:
        """See `Codec.entry`."""
        return self.of.entry(name)

    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None = None) -> Parts:
        """See `Codec.encode`."""
        assert position_BS is not None
        unrotated = rotate_by_position(x_BGSD, -position_BS[:, None], self.frequency_P, self.interleaved)
        return self.of.encode(unrotated, position_BS)

    def decode(self, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.decode`."""
        assert position_BS is not None
        rows_BGSD = self.of.decode(parts, position_BS)
        return rotate_by_position(rows_BGSD, position_BS[:, None], self.frequency_P, self.interleaved)

    def kernel_rows(self, parts: Parts, first: Sequence[int] | None, keys: bool = False) -> Rows | None:
        """See `Codec.kernel_rows`."""
        rows = None if first is None or min(first) < 0 else self.of.kernel_rows(parts, first)
        if (
            rows is None
            or first is None
            or (rows.kind == RESIDUAL and rows.order)
            or 2 * len(self.frequency_P) > WIDEST
        ):
            return None
        cosine, sine = self.angles.until(max(first) + parts["codes"].shape[2])
        starts = (ctypes.c_int64 * len(first))(*first)
        rows.cosine, rows.sine, rows.first = cosine.data_ptr(), sine.data_ptr(), ctypes.addressof(starts)
        rows.P, rows.interleaved = len(self.frequency_P), self.interleaved
        rows.alive = (starts, cosine, sine)
        if isinstance(self.of, PairCodes) and self.of.add_pairs(rows, self.interleaved):
            near = self.angles.near()
            rows.near, rows.frequency = near.data_ptr(), self.angles.frequency_P.data_ptr()
            rows.alive = (*rows.alive, near)
        return rows


class Angles:
    """Cosines and sines of rotary positions, computed once for all layers and steps.

    Args:
        frequency_P: radians per position.
    """

    def __init__(self, frequency_P: Tensor) -> None:
        self.frequency_P = frequency_P.float().contiguous()
        self.known: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.first_P2n = torch.empty(0)

    def until(self, positions: int) -> tuple[Tensor, Tensor]:
        """``[n, P]`` each, for at least this many positions from 0 on."""
        if len(self.known[0]) < positions:
            position_n = torch.arange(positions + max(64, positions // 2), device=self.frequency_P.device)
            angle_nP = position_n[:, None] * self.frequency_P
            self.known = (angle_nP.cos(), angle_nP.sin())
        return self.known

    def near(self) -> Tensor:
        """``[P, 2, BLOCK]``: cosines and sines of the first positions."""
        if not len(self.first_P2n):
            angle_Pn = self.frequency_P[:, None] * torch.arange(BLOCK, device=self.frequency_P.device)
            self.first_P2n = torch.stack([angle_Pn.cos(), angle_Pn.sin()], 1)
        return self.first_P2n


class SharedAngles:
    """The `Angles` of a buffer of frequencies, the same object as long as the buffer does not change."""

    def __init__(self) -> None:
        self._made: tuple[tuple[int, int], Angles] | None = None

    def of(self, frequency_P: Tensor) -> Angles:
        """The angles of these frequencies."""
        state = (frequency_P.data_ptr(), frequency_P._version)
        if self._made is None or self._made[0] != state:
            self._made = (state, Angles(frequency_P))
        return self._made[1]


def _index(codes_ML: Tensor, size: int) -> Tensor:
    """Row indices into the concatenated codebooks of all stages."""
    stage_L = torch.arange(codes_ML.shape[-1], dtype=torch.int32, device=codes_ML.device)
    return codes_ML.to(torch.int32) + stage_L * size

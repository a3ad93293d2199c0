"""Sums by code: what attention needs of rows that are kept as codes, without putting them together again.

A coded row is a sum of one row of each of C tables, so a query's product with it is a sum of C numbers that are looked
up among its products with the tables (`look_up`); and coded rows, weighed and added, are the rows of the tables, each
times the sum of the weights of the tokens that have its code (`sum_by_code`). What is left per token and query is C
additions in place of D multiplications. The products with the tables cost as much as attention to as many tokens as
there are rows in them.

Shapes: B batch, G KV heads, N queries of a KV head (its query heads and new tokens together), S tokens, C codes of a
token, K rows of a table, k = C K rows of all tables; M groups of L = 4 queries, that a kernel takes together.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from pondera.kernels.build import library

LANES = 4
"""Queries that the kernel takes together."""
SCRATCH = 2**22
"""Codes at a time, as indices of four bytes, where there is no kernel."""


class _Codes(ctypes.Structure):
    """As in ``codes.c``; its last two fields are its own."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("codes_B", "codes_G", "codes_S", "B", "G", "N", "S", "C", "K", "threads")
        ),
        *((name, ctypes.c_void_p) for name in ("table", "numbers", "tallies")),
        ("parts", ctypes.c_long),
    )


def look_up(table_BGkN: Tensor, codes_BGSC: Tensor) -> Tensor:
    """The sum over each token's codes of what stands in the tables.

    Args:
        table_BGkN: the C tables of K rows behind one another.
        codes_BGSC: integers below K; the kernel takes uint8, also within larger storage.

    Returns:
        ``[B, G, N, S]``.

    Example:
        >>> table = torch.tensor([[[[1.0], [2.0], [10.0], [20.0]]]])
        >>> look_up(table, torch.tensor([[[[0, 1], [1, 1]]]], dtype=torch.uint8)).tolist()
        [[[[21.0, 22.0]]]]
    """
    B, G, rows, N = table_BGkN.shape
    S, C = codes_BGSC.shape[2:]
    score_BGNS = table_BGkN.new_empty(B, G, N, S)
    # An expanded batch is written out, as the kernel wants a table for every row.
    table_BGkML = functional.pad(table_BGkN, (0, -N % LANES)).unflatten(3, (-1, LANES))
    if _natively("lookup", table_BGkML.transpose(2, 3).contiguous(), codes_BGSC, score_BGNS):
        return score_BGNS
    first_C = torch.arange(C, dtype=torch.int32, device=codes_BGSC.device) * (rows // C)
    found = [
        functional.embedding_bag(codes_SC.to(torch.int32) + first_C, table_kN, mode="sum")
        for table_kN, codes in zip(table_BGkN.flatten(0, 1), codes_BGSC.flatten(0, 1), strict=True)
        for codes_SC in codes.split(max(1, SCRATCH // C))
    ]
    return torch.cat(found).view(B, G, S, N).mT


def sum_by_code(weight_BGNS: Tensor, codes_BGSC: Tensor, codes: int) -> Tensor:
    """The sum of the weights of the tokens that have each code.

    Args:
        weight_BGNS: of tokens, for each query.
        codes_BGSC: see `look_up`.
        codes: K.

    Returns:
        ``[B, G, C K, N]``, as the tables of `look_up`.

    Example:
        >>> codes = torch.tensor([[[[0, 1], [1, 1]]]], dtype=torch.uint8)
        >>> sum_by_code(torch.tensor([[[[0.5, 2.0]]]]), codes, 2).flatten().tolist()
        [0.5, 2.0, 0.0, 2.5]
    """
    B, G, N, _ = weight_BGNS.shape
    rows, groups = codes_BGSC.shape[3] * codes, -(-N // LANES)
    tally_BGMkL = weight_BGNS.new_empty(B, G, groups, rows, LANES)
    if _natively("tally", tally_BGMkL, codes_BGSC, weight_BGNS.contiguous()):
        return tally_BGMkL.transpose(2, 3).flatten(3)[..., :N]
    tally_BGNk = weight_BGNS.new_zeros(B, G, N, rows)
    for c, codes_BGS in enumerate(codes_BGSC.unbind(3)):
        tally_BGNk.scatter_add_(3, (codes_BGS.long() + c * codes)[:, :, None].expand(-1, -1, N, -1), weight_BGNS)
    return tally_BGNk.mT


def _natively(what: str, table_BGMkL: Tensor, codes_BGSC: Tensor, number_BGNS: Tensor) -> bool:
    """Lets the kernel fill in the scores, or the tallies; false where there is none for such tensors."""
    floats = (table_BGMkL, number_BGNS)
    if (
        torch.compiler.is_compiling()
        or any(type(x) is not Tensor or x.device.type != "cpu" for x in (*floats, codes_BGSC))
        or any(x.dtype != torch.float32 or x.requires_grad for x in floats)
        or codes_BGSC.dtype != torch.uint8
        or codes_BGSC.stride(-1) != 1
    ):
        return False
    kernel = library("codes")
    if kernel is None:
        return False
    (B, G, N, S), C = number_BGNS.shape, codes_BGSC.shape[3]
    told = _Codes(
        codes_BGSC.data_ptr(),
        *codes_BGSC.stride()[:3],
        *(B, G, N, S, C, table_BGMkL.shape[3] // C, torch.get_num_threads()),
        table_BGMkL.data_ptr(),
        number_BGNS.data_ptr(),
    )
    if getattr(kernel, what)(ctypes.byref(told)):
        raise MemoryError(f"codes of {S} tokens")
    return True

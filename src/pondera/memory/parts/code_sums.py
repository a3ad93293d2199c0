"""Attention in the space of codes: products with coded rows, and sums of them, that decode no row.

A coded row is a sum of C rows of a book, one of each of its C tables of K rows, so a query's product with it is a sum of C
numbers that are looked up among its products with the whole book; and weighted rows add up to the book's rows, each weighed
by the sum of the weights of the tokens that have its code. Both are the same as decoding first, but for rounding. What is
left per token and query is C additions instead of D multiplications; the products with the book cost as much as attention to
C K tokens, so this pays where the past is longer than that, and saves memory in any case.

Shapes: B batch, G KV heads, N queries of a KV head (its query heads and new tokens together), S tokens, C codes of a token,
K rows of a table, D head width; M groups of L = 4 queries, that a kernel takes together.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from pondera.native.build import library

LANES = 4
"""Queries that the kernel takes together."""


class _Codes(ctypes.Structure):
    """As in ``codes.c``; its last two fields are its own."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("codes_B", "codes_G", "codes_S", "B", "G", "N", "S", "C", "K", "threads")),
        *((name, ctypes.c_void_p) for name in ("table", "numbers", "tallies")),
        ("parts", ctypes.c_long),
    )


def dot_codes(query_BGND: Tensor, book_GCKD: Tensor, codes_BGSC: Tensor) -> Tensor:
    """Products of queries with coded rows.

    Args:
        query_BGND: float32.
        book_GCKD: the tables of each head, or ``[1, C, K, D]`` for all.
        codes_BGSC: uint8, or any integers where there is no kernel; below K. A view of larger storage will do.

    Returns:
        ``[B, G, N, S]``.

    Example:
        >>> book = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, 10.0]]]])
        >>> codes = torch.tensor([[[[0, 1], [1, 1]]]], dtype=torch.uint8)
        >>> dot_codes(torch.tensor([[[[1.0, 2.0]]]]), book, codes).tolist()
        [[[[21.0, 22.0]]]]
    """
    B, G, N, _ = query_BGND.shape
    (C, K), S = book_GCKD.shape[1:3], codes_BGSC.shape[2]
    query_BGMLD = functional.pad(query_BGND, (0, 0, 0, -N % LANES)).unflatten(2, (-1, LANES))
    table_BGMcL = torch.matmul(book_GCKD.flatten(1, 2)[:, None], query_BGMLD.mT)
    score_BGNS = query_BGND.new_empty(B, G, N, S)
    if _natively("lookup", codes_BGSC, K, table_BGMcL, score_BGNS):
        return score_BGNS
    table_BGCKN = table_BGMcL.movedim(2, -2).flatten(-2).unflatten(2, (C, K))
    score_BGNS.zero_()
    for c in range(C):
        code_BGSN = codes_BGSC[..., c, None].long().expand(-1, -1, -1, N)
        score_BGNS += table_BGCKN[:, :, c, :, :N].gather(2, code_BGSN).mT
    return score_BGNS


def mix_codes(weight_BGNS: Tensor, book_GCKD: Tensor, codes_BGSC: Tensor) -> Tensor:
    """Sums of coded rows, weighed.

    Args:
        weight_BGNS: float32.
        book_GCKD, codes_BGSC: see `dot_codes`.

    Returns:
        ``[B, G, N, D]``.

    Example:
        >>> book = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, 10.0]]]])
        >>> codes = torch.tensor([[[[0, 1], [1, 1]]]], dtype=torch.uint8)
        >>> mix_codes(torch.tensor([[[[0.5, 2.0]]]]), book, codes).tolist()
        [[[[0.5, 27.0]]]]
    """
    B, G, N, _ = weight_BGNS.shape
    C, K = book_GCKD.shape[1:3]
    M = -(-N // LANES)
    weight_BGNS = weight_BGNS.contiguous()
    tally_BGMcL = weight_BGNS.new_empty(B, G, M, C * K, LANES)
    if not _natively("tally", codes_BGSC, K, tally_BGMcL, weight_BGNS):
        tally_BGCNK = weight_BGNS.new_zeros(B, G, C, M * LANES, K)
        for c in range(C):
            code_BGNS = codes_BGSC[:, :, None, :, c].long().expand(-1, -1, N, -1)
            tally_BGCNK[:, :, c, :N].scatter_add_(3, code_BGNS, weight_BGNS)
        tally_BGMcL = tally_BGCNK.unflatten(3, (M, LANES)).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)
    return torch.matmul(tally_BGMcL.mT, book_GCKD.flatten(1, 2)[:, None]).flatten(2, 3)[:, :, :N]


def _natively(what: str, codes_BGSC: Tensor, K: int, table_BGMcL: Tensor, number_BGNS: Tensor) -> bool:
    """Lets the kernel fill in the scores, or the tallies; false where there is none for such tensors."""
    floats = (table_BGMcL, number_BGNS)
    if (
        torch.compiler.is_compiling()
        or any(type(x) is not Tensor or x.device.type != "cpu" for x in (*floats, codes_BGSC))
        or any(x.dtype != torch.float32 or not x.is_contiguous() or x.requires_grad for x in floats)
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
        *(B, G, N, S, C, K, torch.get_num_threads()),
        table_BGMcL.data_ptr(),
        number_BGNS.data_ptr(),
    )
    if getattr(kernel, what)(ctypes.byref(told)):
        raise MemoryError(f"codes of {S} tokens")
    return True

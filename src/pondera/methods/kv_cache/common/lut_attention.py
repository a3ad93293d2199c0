"""Look-up-table attention: attention on codes of keys and values, without decoding them.

A coded key is a sum of one row of each of C tables, so its product with a query is a sum of C numbers from the products
of the query with all table rows (`look_up`). A weighted sum of coded values is the sum of all table rows, each
multiplied by the total weight of the tokens with its code (`sum_by_code`). A token and query then cost C additions
instead of D multiplications. The products with the tables cost as much as attention to one token per table row.

Shapes: B batch, G KV heads, N queries of a KV head (its query heads and new tokens together), S tokens, C codes of a
token, K rows of a table, k = C K rows of all tables; M groups of L = 4 queries, which a kernel computes together.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from pondera.kernels.build import library

LANES = 4
"""Number of queries that the kernel computes together."""
SCRATCH = 2**22
"""Maximum number of codes per step without a kernel; each needs an index of four bytes."""


class _Codes(ctypes.Structure):
    """The struct of ``codes.c``; the kernel sets its last two fields."""

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
    """Sums the table entries of each token's codes.

    Args:
        table_BGkN: the C tables of K rows, concatenated.
        codes_BGSC: integers below K; the kernel takes uint8, also as a view of larger storage.

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
    # Copies an expanded batch, because the kernel needs one table per batch row.
    table_BGkML = functional.pad(table_BGkN, (0, -N % LANES)).unflatten(3, (-1, LANES))
    if _natively("lookup", table_BGkML.transpose(2, 3).contiguous(), codes_BGSC, score_BGNS):
        return score_BGNS
    first_C = torch.arange(C, dtype=torch.int32, device=codes_BGSC.device) * (rows // C)
    scores = [
        functional.embedding_bag(codes_SC.to(torch.int32) + first_C, table_kN, mode="sum")
        for table_kN, codes in zip(table_BGkN.flatten(0, 1), codes_BGSC.flatten(0, 1), strict=True)
        for codes_SC in codes.split(max(1, SCRATCH // C))
    ]
    return torch.cat(scores).view(B, G, S, N).mT


def sum_by_code(weight_BGNS: Tensor, codes_BGSC: Tensor, codes: int) -> Tensor:
    """Sums, per code, the weights of the tokens with this code.

    Args:
        weight_BGNS: weights of the tokens, for each query.
        codes_BGSC: see `look_up`.
        codes: K.

    Returns:
        ``[B, G, C K, N]``, in the layout of the tables of `look_up`.

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
    """Runs the kernel, which writes the scores or the sums; False if it does not support these tensors."""
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
    arguments = _Codes(
        codes_BGSC.data_ptr(),
        *codes_BGSC.stride()[:3],
        *(B, G, N, S, C, table_BGMkL.shape[3] // C, torch.get_num_threads()),
        table_BGMkL.data_ptr(),
        number_BGNS.data_ptr(),
    )
    if getattr(kernel, what)(ctypes.byref(arguments)):
        raise MemoryError(f"codes of {S} tokens")
    return True

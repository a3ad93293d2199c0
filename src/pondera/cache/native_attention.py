"""Attention of a few queries to many slots by a native kernel, which reads each key and value once.

The slow twin is `pondera.cache.slot_attention.attend`. torch's fused attention reads them once for every query head, and
on a CPU most of its threads have nothing to do where there is one query and few heads.

Shapes: B batch, G KV heads, R query heads per KV head, H = G R, T queries, S slots, D head width, K tokens.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from pondera.kernels.build import library
from pondera.kernels.call import fit_rows

FEW = 8
"""Queries of a call up to which memory, and not arithmetic, is what attention waits for."""


class Attended(NamedTuple):
    """``[B, T, H, D]``, and ``[B, G, R, T, S]`` scaled products where they were asked for."""

    out_BTHD: Tensor
    score_BGRTS: Tensor | None


_TENSORS = ("query", "keys", "values", "position", "mask")
_NUMBERS = (
    *("B", "G", "R", "T", "S", "D", "E"),
    *("query_B", "query_G", "query_R", "query_T", "keys_B", "keys_G", "keys_S", "values_B", "values_G", "values_S"),
    *("position_B", "position_G", "mask_B", "mask_T", "mask_K", "start", "threads"),
)


class _Attention(ctypes.Structure):
    """As in ``attention.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_float),
        ("out", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
    )


def attend_natively(
    query_BGRTD: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    position_BGS: Tensor,
    mask_B1TK: Tensor | None,
    start: int,
    scaling: float,
    with_scores: bool = False,
) -> Attended | None:
    """Softmax attention; none where there is no kernel for it.

    Args:
        query_BGRTD: queries by KV head; any strides but in the last dimension, as of keys and values.
        keys_BGSD, values_BGSD: what is kept, in any order.
        position_BGS: int32, the token that each slot holds; negative where there is nothing to look at.
        mask_B1TK: which tokens each query may look at; none: those that do not come after it.
        start: the token of the first query.
        scaling: of the products.
        with_scores: gives them too, ``-inf`` where a query may not look.

    A query that may look nowhere gets zeros.
    """
    B, G, R, T, D = query_BGRTD.shape
    kernel = library("attention") if T <= FEW and _fit(query_BGRTD, keys_BGSD, values_BGSD, position_BGS) else None
    if kernel is None:
        return None
    S, E = values_BGSD.shape[2:]
    out_BTHE = query_BGRTD.new_empty(B, T, G * R, E)
    score_BGRTS = query_BGRTD.new_empty(B, G, R, T, S) if with_scores else None
    mask_steps = (0, 0, 0) if mask_B1TK is None else (mask_B1TK.stride(0), mask_B1TK.stride(2), mask_B1TK.stride(3))
    told = _Attention(
        query_BGRTD.data_ptr(),
        keys_BGSD.data_ptr(),
        values_BGSD.data_ptr(),
        position_BGS.data_ptr(),
        None if mask_B1TK is None else mask_B1TK.data_ptr(),
        *(B, G, R, T, S, D, E),
        *query_BGRTD.stride()[:4],
        *keys_BGSD.stride()[:3],
        *values_BGSD.stride()[:3],
        *position_BGS.stride()[:2],
        *mask_steps,
        *(start, torch.get_num_threads()),
        scaling,
        out_BTHE.data_ptr(),
        None if score_BGRTS is None else score_BGRTS.data_ptr(),
    )
    if kernel.attention(ctypes.byref(told)):
        raise MemoryError(f"attention to {S} slots")
    return Attended(out_BTHE, score_BGRTS)


def _fit(query_BGRTD: Tensor, keys_BGSD: Tensor, values_BGSD: Tensor, position_BGS: Tensor) -> bool:
    """Whether the kernel can read them."""
    return (
        fit_rows(query_BGRTD, keys_BGSD, values_BGSD)
        and position_BGS.dtype == torch.int32
        and position_BGS.device.type == "cpu"
        and position_BGS.stride(-1) == 1
    )

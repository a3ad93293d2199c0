"""Eviction of a few slots with a native kernel, and the sums of attention weights that scores are made of.

The reference implementations are `evict_lowest` of `pondera.methods.kv_cache.common.policy`, with scores by `protected_score`,
and ``weight_BGRTS.sum((2, 3))``. One call replaces a dozen operations of torch per layer and token.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pondera.kernels.build import library
from pondera.kernels.call import fit

MOST = 4096
"""The most heads of all batch rows; the kernel has a number for each on its stack."""


class _Evict(ctypes.Structure):
    """The arguments of ``evict``; the same struct is defined in ``evict.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("position", "score", "limit", "first")),
        *((name, ctypes.c_int64) for name in ("B", "G", "S", "position_B", "position_G", "score_B", "score_G")),
        *((name, ctypes.c_int64) for name in ("seen", "recent", "most")),
        ("share", ctypes.c_double),
    )


class _Received(ctypes.Structure):
    """The arguments of ``received``; the same struct is defined in ``evict.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "received")),
        *((name, ctypes.c_int64) for name in "RNS"),
    )


def evict_natively(
    position_BGS: Tensor,
    score_BGS: Tensor,
    limits: list[list[int]],
    first: list[int],
    seen: int,
    recent: int | float,
    most: int,
) -> int | None:
    """Empties the slots with the lowest scores of every head that has more slots than its limit; among equal ones the oldest.

    Args:
        position_BGS: int32, see `KVStore`; changed in place.
        score_BGS: float32.
        limits: the slots that each head of each batch row may have.
        first: for each batch row, the position before which tokens (the sinks) are evicted last.
        seen: the number of tokens seen.
        recent: the latest tokens, which are evicted last: a number, or a share of the limit.
        most: the most slots that a head may lose; with more to lose, nothing is evicted.

    Returns:
        The number of slots that the head with the largest excess had to lose, 0 or less if none; `None` if no kernel supports
        the arguments.
    """
    B, G, S = position_BGS.shape
    if B * G > MOST or torch.compiler.is_compiling():
        return None
    for rows in (position_BGS, score_BGS):
        if type(rows) is not Tensor or rows.device.type != "cpu" or rows.stride(2) != 1 or rows.requires_grad:
            return None
    if score_BGS.dtype != torch.float32 or score_BGS.shape != position_BGS.shape:
        return None
    kernel = library("evict")
    if kernel is None:
        return None
    share = isinstance(recent, float)
    limit_BG = (ctypes.c_int64 * (B * G))(*(number for row in limits for number in row))
    first_B = (ctypes.c_int64 * B)(*first)
    arguments = _Evict(
        position_BGS.data_ptr(),
        score_BGS.data_ptr(),
        ctypes.addressof(limit_BG),
        ctypes.addressof(first_B),
        *(B, G, S),
        *position_BGS.stride()[:2],
        *score_BGS.stride()[:2],
        *(seen, -1 if share else recent, most),
        recent if share else 0,
    )
    return kernel.evict(ctypes.byref(arguments))


def received_natively(score_BGRTS: Tensor) -> Tensor | None:
    """``[B, G, S]``: the softmax of each row of scores, summed over queries; `None` if no kernel supports the arguments.

    Args:
        score_BGRTS: ``-inf`` where a query may not attend; the weights of a query that may attend to no slot are 0.
    """
    if not fit(score_BGRTS) or (torch.is_grad_enabled() and score_BGRTS.requires_grad):
        return None
    kernel = library("evict")
    if kernel is None:
        return None
    B, G, R, T, S = score_BGRTS.shape
    received_BGS = score_BGRTS.new_empty(B, G, S)
    if kernel.received(ctypes.byref(_Received(score_BGRTS.data_ptr(), received_BGS.data_ptr(), B * G, R * T, S))):
        raise MemoryError(f"attention weights of {S} slots")
    return received_BGS

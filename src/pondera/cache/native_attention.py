"""Attention of a few queries to many KV slots with a native kernel, which reads each key and value once.

The reference implementation is `pondera.cache.slot_attention.attend`. torch's fused attention reads keys and values once
for every query head; on a CPU, with one query and few heads, most of its threads are idle.

Shapes: B batch, G KV heads, R query heads per KV head, H = G R, T queries, S slots, D head width, K tokens.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pondera.kernels.build import library
from pondera.kernels.call import fit_rows

FEW = 8
"""Up to this many queries per call, attention is memory-bound."""


class Attended(NamedTuple):
    """The output ``[B, T, H, D]``, and the scores ``[B, G, R, T, S]`` if the caller requested them."""

    out_BTHD: Tensor
    score_BGRTS: Tensor | None


_TENSORS = ("query", "keys", "values", "index", "position", "mask")
_NUMBERS = (
    *("B", "G", "R", "T", "S", "D", "E"),
    *("query_B", "query_G", "query_R", "query_T", "keys_B", "keys_G", "keys_S", "values_B", "values_G", "values_S"),
    *("position_B", "position_G", "index_B", "index_G", "mask_B", "mask_T", "mask_K", "start", "threads"),
)


class Arguments(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``attention.h``."""

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
    slot_BGk: Tensor | None = None,
) -> Attended | None:
    """Softmax attention over KV slots; returns `None` if no kernel supports the arguments.

    A query that may attend to no slot gets zeros.

    Args:
        query_BGRTD: queries by KV head; any strides except in the last dimension, also for keys and values.
        keys_BGSD, values_BGSD: the kept slots, in any order.
        position_BGS: int32, the index of each slot's token; negative for slots that no query may attend to.
        mask_B1TK: true where a query may attend; `None`: plain causal attention.
        start: the index of the first query's token.
        scaling: the factor of the dot products.
        with_scores: whether to return the scores as well, ``-inf`` where a query may not attend.
        slot_BGk: int64, the slots to attend to, negative for none; default: `None`, all slots.
    """
    B, G, R, T, D = query_BGRTD.shape
    fits = position_BGS.dtype == torch.int32 and position_BGS.device.type == "cpu" and position_BGS.stride(-1) == 1
    fits = fits and T <= FEW and fit_rows(query_BGRTD, keys_BGSD, values_BGSD)
    kernel = library("attention") if fits else None
    if kernel is None:
        return None
    S, E = values_BGSD.shape[2:]
    index, index_steps = None, (0, 0)
    if slot_BGk is not None:
        if slot_BGk.stride(-1) != 1:
            slot_BGk = slot_BGk.contiguous()
        S, index, index_steps = slot_BGk.shape[2], slot_BGk.data_ptr(), slot_BGk.stride()[:2]
    out_BTHE = query_BGRTD.new_empty(B, T, G * R, E)
    score_BGRTS = query_BGRTD.new_empty(B, G, R, T, S) if with_scores else None
    mask_steps = (0, 0, 0) if mask_B1TK is None else (mask_B1TK.stride(0), mask_B1TK.stride(2), mask_B1TK.stride(3))
    arguments = Arguments(
        query_BGRTD.data_ptr(),
        keys_BGSD.data_ptr(),
        values_BGSD.data_ptr(),
        index,
        position_BGS.data_ptr(),
        None if mask_B1TK is None else mask_B1TK.data_ptr(),
        *(B, G, R, T, S, D, E),
        *query_BGRTD.stride()[:4],
        *keys_BGSD.stride()[:3],
        *values_BGSD.stride()[:3],
        *position_BGS.stride()[:2],
        *index_steps,
        *mask_steps,
        *(start, torch.get_num_threads()),
        scaling,
        out_BTHE.data_ptr(),
        None if score_BGRTS is None else score_BGRTS.data_ptr(),
    )
    if kernel.attention(ctypes.byref(arguments)):
        raise MemoryError(f"attention to {S} slots")
    return Attended(out_BTHE, score_BGRTS)


class Attending:
    """`attend_natively` of one token without a mask for one storage of KV slots, prepared: a step changes only what is new.

    Args:
        storage: keys and values ``[B, G, room, D]`` and positions ``[B, G, room]``.
    """

    def __init__(self, storage: tuple[Tensor, Tensor, Tensor]) -> None:
        keys, values, position = self.storage = storage
        self.supported = position.dtype == torch.int32 and position.device.type == "cpu" and position.stride(-1) == 1
        self.supported = self.supported and fit_rows(keys, values)
        B, G, _, D = keys.shape
        self.shape = B, G, values.shape[3]
        arguments = self.arguments = Arguments(None, keys.data_ptr(), values.data_ptr(), None, position.data_ptr())
        arguments.B, arguments.G, arguments.T, arguments.D, arguments.E = B, G, 1, D, values.shape[3]
        arguments.keys_B, arguments.keys_G, arguments.keys_S, _ = keys.stride()
        arguments.values_B, arguments.values_G, arguments.values_S, _ = values.stride()
        arguments.position_B, arguments.position_G, _ = position.stride()

    def __call__(
        self,
        query_BGR1D: Tensor,
        used: int,
        start: int,
        scaling: float,
        with_scores: bool = False,
        slot_BGk: Tensor | None = None,
    ) -> Attended | None:
        """See `attend_natively`; `used` is the number of slots in use."""
        kernel = library("attention") if self.supported and fit_rows(query_BGR1D, self.storage[0]) else None
        if kernel is None:
            return None
        arguments, (B, G, E) = self.arguments, self.shape
        R, S = query_BGR1D.shape[2], used
        arguments.index = None
        if slot_BGk is not None:
            if slot_BGk.stride(-1) != 1:
                slot_BGk = slot_BGk.contiguous()
            S, arguments.index = slot_BGk.shape[2], slot_BGk.data_ptr()
            arguments.index_B, arguments.index_G, _ = slot_BGk.stride()
        out_B1HE = query_BGR1D.new_empty((B, 1, G * R, E))
        score_BGR1S = query_BGR1D.new_empty((B, G, R, 1, S)) if with_scores else None
        arguments.query_B, arguments.query_G, arguments.query_R, arguments.query_T, _ = query_BGR1D.stride()
        arguments.query, arguments.R, arguments.S, arguments.start = query_BGR1D.data_ptr(), R, S, start
        arguments.threads, arguments.scaling, arguments.out = torch.get_num_threads(), scaling, out_B1HE.data_ptr()
        arguments.scores = None if score_BGR1S is None else score_BGR1S.data_ptr()
        if kernel.attention(ctypes.byref(arguments)):
            raise MemoryError(f"attention to {S} slots")
        return Attended(out_B1HE, score_BGR1S)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a store prepares its own."""


def scores_natively(
    query_BGRD: Tensor, keys_BGSD: Tensor, position_BGS: Tensor, start: int, scaling: float
) -> Tensor | None:
    """``[B, G, R, 1, S]``: scores of one query per head, ``-inf`` for masked slots; `None` if no kernel supports the arguments.

    Args:
        query_BGRD, keys_BGSD, scaling: see `attend_natively`.
        position_BGS: as in `attend_natively`, contiguous; negative for masked slots.
        start: slots with later positions are masked.
    """
    B, G, R, D = query_BGRD.shape
    fits = position_BGS.dtype == torch.int32 and position_BGS.device.type == "cpu" and position_BGS.is_contiguous()
    kernel = library("attention") if fits and fit_rows(query_BGRD, keys_BGSD) else None
    if kernel is None:
        return None
    S = keys_BGSD.shape[2]
    score_BGR1S = query_BGRD.new_empty(B, G, R, 1, S)
    arguments = Arguments(
        *(query_BGRD.data_ptr(), keys_BGSD.data_ptr(), None, None, position_BGS.data_ptr(), None),
        *(B, G, R, 1, S, D, 0),
        *(*query_BGRD.stride()[:3], 0),
        *(*keys_BGSD.stride()[:3], 0, 0, 0),
        *(*position_BGS.stride()[:2], 0, 0, 0, 0, 0),
        *(start, torch.get_num_threads()),
        scaling,
        None,
        score_BGR1S.data_ptr(),
    )
    if kernel.attention(ctypes.byref(arguments)):
        raise MemoryError(f"scores of {S} slots")
    return score_BGR1S

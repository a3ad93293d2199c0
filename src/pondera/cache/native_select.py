"""The selection of slots by votes of all heads of a layer, in one native call.

The reference implementation is the rest of `pondera.methods.kv_cache.token_select.TokenSelect.select_kv`: two dozen operations
of torch over all slots, in every layer of every token.

Shapes: B batch, G KV heads, R query heads per KV head, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pondera.cache.native_attention import Arguments
from pondera.kernels.build import library
from pondera.kernels.call import fit_rows


class _Select(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``select.c``."""

    _fields_ = (
        ("scores", Arguments),
        *((name, ctypes.c_void_p) for name in ("first", "last", "note")),
        *((name, ctypes.c_int64) for name in ("note_B", "note_G", "recent", "chosen", "remember")),
        ("reuse", ctypes.c_double),
        ("index", ctypes.c_void_p),
    )


def select_natively(
    query_BGR1D: Tensor,
    keys_BGSD: Tensor,
    position_BGS: Tensor,
    last_BGRD: Tensor,
    note_BGS: Tensor,
    first: list[int],
    recent: int,
    chosen: int,
    reuse: float,
    start: int,
    scaling: float,
    remember: bool,
) -> tuple[Tensor | None] | None:
    """The slots that one token attends to, ``([B, k],)`` or ``(None,)`` for all; `None` if no kernel supports the arguments.

    Args:
        query_BGR1D: the queries.
        keys_BGSD, position_BGS: of the slots in use; all heads have the same tokens.
        last_BGRD: the queries of the last selection, zeros if there was none; changed by a new one.
        note_BGS: above 0 for slots of the last selection; changed by a new one.
        first: for each batch row, slots of tokens before this position are always selected.
        recent: so are those from this position on.
        chosen: the number of other selected slots; a row with no more than that selects all.
        reuse: the cosine of the queries from which the last selection is used again.
        start: the position of the token.
        scaling: the factor of the dot products.
        remember: whether a new selection becomes the last one.
    """
    B, G, R, _, D = query_BGR1D.shape
    S = keys_BGSD.shape[2]
    if torch.is_grad_enabled() or not fit_rows(query_BGR1D, keys_BGSD, note_BGS) or not fit_rows(last_BGRD):
        return None
    if position_BGS.dtype != torch.int32 or position_BGS.stride(-1) != 1 or not last_BGRD.is_contiguous():
        return None
    kernel = library("select")
    if kernel is None:
        return None
    index_BS, score_BGRS = position_BGS.new_empty((B, S), dtype=torch.int64), query_BGR1D.new_empty((B, G, R, S))
    arguments = _Select()
    scores = arguments.scores
    scores.query, scores.keys, scores.position = query_BGR1D.data_ptr(), keys_BGSD.data_ptr(), position_BGS.data_ptr()
    scores.B, scores.G, scores.R, scores.T, scores.S, scores.D = B, G, R, 1, S, D
    scores.query_B, scores.query_G, scores.query_R, scores.query_T, _ = query_BGR1D.stride()
    scores.keys_B, scores.keys_G, scores.keys_S, _ = keys_BGSD.stride()
    scores.position_B, scores.position_G, _ = position_BGS.stride()
    scores.start, scores.threads, scores.scaling = start, torch.get_num_threads(), scaling
    scores.scores = score_BGRS.data_ptr()
    first_B = (ctypes.c_int64 * B)(*first)
    arguments.first, arguments.last, arguments.note = (
        ctypes.addressof(first_B),
        last_BGRD.data_ptr(),
        note_BGS.data_ptr(),
    )
    arguments.note_B, arguments.note_G, _ = note_BGS.stride()
    arguments.recent, arguments.chosen, arguments.remember = recent, chosen, remember
    arguments.reuse, arguments.index = reuse, index_BS.data_ptr()
    kernel.select_slots.restype = ctypes.c_int64
    most = kernel.select_slots(ctypes.byref(arguments))
    if most < 0:
        raise MemoryError(f"votes for {S} slots")
    return (index_BS[:, :most] if most else None,)

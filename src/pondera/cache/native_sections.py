"""Attention of one token to sections of a cache, exact or coded, with one native call.

The reference implementation is `pondera.methods.kv_cache.common.cache_sections.attend_to_sections`, which calls a dozen
operations of torch for each section.

Shapes: B batch, G KV heads, N query heads per KV head, H = G N, S tokens of a section, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pondera.kernels.build import library
from pondera.kernels.call import fit_rows

DENSE, UNIFORM, RESIDUAL, PAIRS = range(4)
"""Kinds of rows."""
WIDEST = 1024
"""The widest head of the kernel."""
COLUMNS = 32
"""The number of columns of a table for products is a multiple of this."""
BLOCK = 64
"""The tokens of a block of the kernel."""


class Rows(ctypes.Structure):
    """Keys or values of a section; the same struct is defined in ``rows.h``."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("data", "least", "step")),
        *((name, ctypes.c_int64) for name in ("data_B", "data_G", "data_S", "least_B", "least_G", "step_B", "step_G")),
        *((name, ctypes.c_int64) for name in ("bits", "group", "by_channel")),
        ("table", ctypes.c_void_p * 2),
        ("order", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        *((name, ctypes.c_int64 * 2) for name in ("stages", "width")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "first")),
        *((name, ctypes.c_int64) for name in ("P", "interleaved")),
        ("columns", ctypes.c_void_p * 2),
        ("column_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pair_table", "pair_units", "near", "frequency")),
        *((name, ctypes.c_int64) for name in ("pair_count", "token_bytes")),
    )
    alive: Any = None  # what the pointers point to, if nothing else keeps it


class _Section(ctypes.Structure):
    """One section; the same struct is defined in ``sections.h``."""

    _fields_ = (
        ("keys", Rows),
        ("values", Rows),
        *((name, ctypes.c_void_p) for name in ("held", "position", "number")),
        *((name, ctypes.c_int64) for name in ("tokens", "position_B", "position_G")),
    )


class _New(ctypes.Structure):
    """A new key or value, and where it is stored; the same struct is defined in ``sections.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "target")),
        *((name, ctypes.c_int64) for name in ("from_B", "from_G", "to_B", "to_G")),
    )


class _Sections(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``sections.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sections", "query")),
        *(
            (name, ctypes.c_int64)
            for name in ("count", "B", "G", "N", "D", "E", "query_B", "query_G", "query_N", "threads")
        ),
        ("scaling", ctypes.c_float),
        ("out", ctypes.c_void_p),
        *((name, _New) for name in ("key", "value")),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_B", "mask_K")),
    )


@dataclass(slots=True)
class NativeSection:
    """One section for the kernel.

    Args:
        keys, values: the rows; the tensors that they point to must stay alive until the call.
        tokens: S.
        held: for each batch row, the first valid token and the one after the last; default: `None`, all are valid.
        position_BGS: int32, slots of a head contiguous; negative for masked tokens; default: `None`, none is masked.
    """

    keys: Rows
    values: Rows
    tokens: int
    held: Sequence[tuple[int, int]] | None = None
    position_BGS: Tensor | None = None


def dense_rows(rows_BGSD: Tensor) -> Rows | None:
    """Exact rows for the kernel; `None` if it does not support them."""
    if not fit_rows(rows_BGSD):
        return None
    return Rows(DENSE, rows_BGSD.data_ptr(), None, None, *rows_BGSD.stride()[:3])


class SectionsCall:
    """A call of the kernel that may be repeated with other queries, and after changes to `given`.

    Args:
        sections: the sections.
        shape: B, G, N and D.
        width: of a value.
        scaling: the factor of the dot products.

    Attributes:
        given: the sections as the kernel reads them.
        held: for each section, the first valid token of each batch row and the one after the last; `None`: all are valid.
        arguments: those of the kernel.
    """

    def __init__(
        self, sections: Sequence[NativeSection], shape: tuple[int, int, int, int], width: int, scaling: float
    ) -> None:
        B, G, N, D = shape
        self.B, self.heads, self.width = B, G * N, width
        self.given = (_Section * len(sections))()
        self.held: list[Any] = []
        self._alive = sections
        for each, section in zip(self.given, sections, strict=True):
            each.keys, each.values, each.tokens = section.keys, section.values, section.tokens
            held = None
            if section.held is not None:
                held = (ctypes.c_int64 * (2 * B))(*chain.from_iterable(section.held))
                each.held = ctypes.addressof(held)
            self.held.append(held)
            if section.position_BGS is not None:
                each.position = section.position_BGS.data_ptr()
                each.position_B, each.position_G = section.position_BGS.stride()[:2]
        self.arguments = _Sections(ctypes.addressof(self.given), None, len(sections), B, G, N, D, width)
        self.arguments.scaling = scaling

    def __call__(self, query_BH1D: Tensor) -> Tensor | None:
        """Softmax attention, ``[B, 1, H, width]``; `None` if there is no kernel. The query must be one that `fit_rows`.

        Raises:
            MemoryError: the kernel could not allocate memory.
        """
        kernel = library("sections")
        if kernel is None:
            return None
        arguments = self.arguments
        out_B1HE = query_BH1D.new_empty((self.B, 1, self.heads, self.width))
        step_B, step_H, _, _ = query_BH1D.stride()
        arguments.query, arguments.out = query_BH1D.data_ptr(), out_B1HE.data_ptr()
        arguments.query_B, arguments.query_G, arguments.query_N = step_B, arguments.N * step_H, step_H
        arguments.threads = torch.get_num_threads()
        if kernel.sections(ctypes.byref(arguments)):
            raise MemoryError("attention to the sections of a cache")
        return out_B1HE


def attend_natively_to_sections(
    query_BH1D: Tensor, sections: Sequence[NativeSection], heads: int, width: int, scaling: float
) -> Tensor | None:
    """Softmax attention of one token to all sections together, ``[B, 1, H, width]``; `None` if no kernel supports it.

    A query without any valid token gets zeros.

    Args:
        query_BH1D: the queries.
        sections: the sections.
        heads: G.
        width: of a value.
        scaling: the factor of the dot products.
    """
    if not fit_rows(query_BH1D):
        return None
    B, H, _, D = query_BH1D.shape
    return SectionsCall(sections, (B, heads, H // heads, D), width, scaling)(query_BH1D)

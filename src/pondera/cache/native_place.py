"""Stores one new token in a table of KV slots with a native kernel, in place of a dozen operations of torch.

The reference implementation is the rest of `pondera.cache.kv_store.KVStore.append`.

Shapes: B batch, G KV heads, S slots in storage, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pondera.kernels.build import library

MOST = 4096
"""The most heads of all batch rows; the kernel has a slot number for each on its stack."""


NOTES = 4
"""The most notes per slot."""


class _Note(ctypes.Structure):
    """A note of each slot; the same struct is defined in ``place.c``."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("B", ctypes.c_int64),
        ("G", ctypes.c_int64),
        ("start", ctypes.c_float),
    )


class _Place(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``place.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "position", "key", "value")),
        *((name, ctypes.c_int64) for name in ("B", "G", "used", "room", "number", "holes", "key_bytes", "value_bytes")),
        *((name, ctypes.c_int64) for name in ("keys_B", "keys_G", "keys_S", "values_B", "values_G", "values_S")),
        *((name, ctypes.c_int64) for name in ("position_B", "position_G", "key_B", "key_G", "value_B", "value_G")),
        ("notes", ctypes.c_int64),
        ("note", _Note * NOTES),
    )


class Placing:
    """The call of the kernel for one storage, prepared: a step changes only what is new.

    Args:
        storage: keys and values ``[B, G, S, D]`` and positions ``[B, G, S]`` (int32) of a store.
        notes: notes of each slot, ``[B, G, S]``, each with its value for a new slot.
    """

    def __init__(self, storage: tuple[Tensor, Tensor, Tensor], notes: Sequence[tuple[Tensor, float]] = ()) -> None:
        keys, values, position = storage
        self.storage, self.notes = storage, [note for note, _ in notes]
        self.supported = _kept(keys) and _kept(values) and position.device.type == "cpu" and len(notes) <= NOTES
        B, G, S = position.shape
        size, width = keys.element_size(), values.element_size()
        self.sizes = size, width
        arguments = self.arguments = _Place(
            *(keys.data_ptr(), values.data_ptr(), position.data_ptr(), None, None),
            *(B, G, 0, S, 0, 0, size * keys.shape[3], width * values.shape[3]),
            *(size * step for step in keys.stride()[:3]),
            *(width * step for step in values.stride()[:3]),
            *position.stride()[:2],
        )
        self.supported = self.supported and B * G <= MOST
        for number, (note_BGS, start) in enumerate(notes[:NOTES]):
            self.supported = self.supported and note_BGS.dtype == torch.float32 and not note_BGS.requires_grad
            arguments.note[number] = (note_BGS.data_ptr(), *note_BGS.stride()[:2], start)
            arguments.notes = number + 1

    def __call__(self, key_BG1D: Tensor, value_BG1D: Tensor, number: int, used: int, holes: bool) -> int | None:
        """See `place_natively`."""
        keys, values, _ = self.storage
        if not self.supported or not _fit(keys, key_BG1D) or not _fit(values, value_BG1D):
            return None
        kernel = None if torch.compiler.is_compiling() else library("place")
        if kernel is None:
            return None
        arguments, (size, width) = self.arguments, self.sizes
        arguments.key, arguments.value = key_BG1D.data_ptr(), value_BG1D.data_ptr()
        key_B, key_G, _, _ = key_BG1D.stride()
        value_B, value_G, _, _ = value_BG1D.stride()
        arguments.key_B, arguments.key_G = size * key_B, size * key_G
        arguments.value_B, arguments.value_G = width * value_B, width * value_G
        arguments.number, arguments.used, arguments.holes = number, used, holes
        return kernel.place(ctypes.byref(arguments))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a store prepares its own."""


def place_natively(
    storage: tuple[Tensor, Tensor, Tensor],
    key_BG1D: Tensor,
    value_BG1D: Tensor,
    number: int,
    used: int,
    holes: bool,
    notes: Sequence[tuple[Tensor, float]] = (),
) -> int | None:
    """Stores a token of every batch row: in empty slots if every head has one, else after the last slot in use.

    Args:
        storage: see `Placing`.
        key_BG1D, value_BG1D: of the new tokens; of the dtypes of the storage.
        number: the position of the new tokens.
        used: the number of slots in use.
        holes: whether slots among them may be empty.
        notes: see `Placing`.

    Returns:
        The number of slots in use; -1 if the storage has no room, and nothing was stored; `None` if no kernel supports the
        arguments.
    """
    return Placing(storage, notes)(key_BG1D, value_BG1D, number, used, holes)


def _kept(rows_BGSD: Tensor) -> bool:
    """Whether the kernel can write to these rows: on the CPU, contiguous, without gradients."""
    return (
        type(rows_BGSD) is Tensor
        and rows_BGSD.device.type == "cpu"
        and not rows_BGSD.requires_grad
        and (rows_BGSD.stride(3) == 1 or rows_BGSD.shape[3] == 1)
    )


def _fit(rows_BGSD: Tensor, new_BG1D: Tensor) -> bool:
    """Whether the kernel can copy new rows to these."""
    return (
        type(new_BG1D) is Tensor
        and rows_BGSD.dtype == new_BG1D.dtype
        and new_BG1D.device.type == "cpu"
        and (new_BG1D.stride(3) == 1 or new_BG1D.shape[3] == 1)
        and not rows_BGSD.requires_grad
        and not (new_BG1D.requires_grad and torch.is_grad_enabled())
    )

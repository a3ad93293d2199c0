"""Stores one new token in a table of KV slots with a native kernel, in place of a dozen operations of torch.

The reference implementation is the rest of `pondera.cache.kv_store.KVStore.append`.

Shapes: B batch, G KV heads, S slots in storage, D head width.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pondera.kernels.build import library

MOST = 4096
"""The most heads of all batch rows; the kernel has a slot number for each on its stack."""


class _Place(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``place.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "position", "key", "value", "slot")),
        *((name, ctypes.c_int64) for name in ("B", "G", "used", "room", "number", "holes", "key_bytes", "value_bytes")),
        *((name, ctypes.c_int64) for name in ("keys_B", "keys_G", "keys_S", "values_B", "values_G", "values_S")),
        *((name, ctypes.c_int64) for name in ("position_B", "position_G", "key_B", "key_G", "value_B", "value_G")),
    )


def place_natively(
    storage: tuple[Tensor, Tensor, Tensor],
    key_BG1D: Tensor,
    value_BG1D: Tensor,
    number: int,
    used: int,
    holes: bool,
    slot_BG1: Tensor | None = None,
) -> int | None:
    """Stores a token of every batch row: in empty slots if every head has one, else after the last slot in use.

    Args:
        storage: keys and values ``[B, G, S, D]`` and positions ``[B, G, S]`` (int32) of a store.
        key_BG1D, value_BG1D: of the new tokens; of the dtypes of the storage.
        number: the position of the new tokens.
        used: the number of slots in use.
        holes: whether slots among them may be empty.
        slot_BG1: receives the slot of each head; int64, contiguous; default: `None`.

    Returns:
        The number of slots in use; -1 if the storage has no room, and nothing was stored; `None` if no kernel supports the
        arguments.
    """
    B, G, S = storage[2].shape
    if (
        not _fit(storage[0], key_BG1D)
        or not _fit(storage[1], value_BG1D)
        or B * G > MOST
        or torch.compiler.is_compiling()
    ):
        return None
    kernel = library("place")
    if kernel is None:
        return None
    keys, values, position = storage
    size, width = keys.element_size(), values.element_size()
    keys_B, keys_G, keys_S, _ = keys.stride()
    values_B, values_G, values_S, _ = values.stride()
    key_B, key_G, _, _ = key_BG1D.stride()
    value_B, value_G, _, _ = value_BG1D.stride()
    position_B, position_G, _ = position.stride()
    arguments = _Place(
        *(keys.data_ptr(), values.data_ptr(), position.data_ptr(), key_BG1D.data_ptr(), value_BG1D.data_ptr()),
        None if slot_BG1 is None else slot_BG1.data_ptr(),
        *(B, G, used, S, number, holes, size * keys.shape[3], width * values.shape[3]),
        *(size * keys_B, size * keys_G, size * keys_S, width * values_B, width * values_G, width * values_S),
        *(position_B, position_G, size * key_B, size * key_G, width * value_B, width * value_G),
    )
    return kernel.place(ctypes.byref(arguments))


def _fit(rows_BGSD: Tensor, new_BG1D: Tensor) -> bool:
    """Whether the kernel can copy these rows: on the CPU, contiguous, without gradients."""
    if type(rows_BGSD) is not Tensor or type(new_BG1D) is not Tensor or rows_BGSD.dtype != new_BG1D.dtype:
        return False
    if rows_BGSD.device.type != "cpu" or new_BG1D.device.type != "cpu":
        return False
    if rows_BGSD.requires_grad or (new_BG1D.requires_grad and torch.is_grad_enabled()):
        return False
    return rows_BGSD.stride(3) == new_BG1D.stride(3) == 1 or rows_BGSD.shape[3] == 1

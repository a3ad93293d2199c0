"""Calling kernels with tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from pondera.kernels.build import library


def fit(*tensors: Tensor) -> bool:
    """Whether a kernel can read these tensors as they are: contiguous float32 in a CPU's memory.

    Not where torch traces what it should only record (`torch.compile`, fake tensors), as it cannot look into a kernel.

    Example:
        >>> fit(torch.ones(3, 4)), fit(torch.ones(3, 4).T), fit(torch.ones(3, 4).double())
        (True, False, False)
    """
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
        for x in tensors
    )


def fit_rows(*tensors: Tensor) -> bool:
    """Whether a kernel that takes strides can read them: a CPU's float32, numbers of a row side by side, no gradient wanted.

    Example:
        >>> fit_rows(torch.ones(3, 4)[:, 1:]), fit_rows(torch.ones(3, 4).T)
        (True, False)
    """
    if torch.compiler.is_compiling():
        return False
    gradient = torch.is_grad_enabled()
    for x in tensors:  # no generator: this is asked for every token and layer
        if not (type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1):
            return False
        if gradient and x.requires_grad:
            return False
    return True


def run(name: str, *arguments: Tensor | int | float | None) -> bool:
    """Calls the function ``name`` of ``name.c``, which may take long and lets other Python threads run meanwhile.

    Args:
        name: of the source and its function, which returns an ``int``: 0 where it did its work.
        arguments: tensors, which it gets as addresses of their first numbers (None: NULL); ``int`` as ``int64_t`` and
            ``float`` as ``double``. Nobody checks them against the source.

    Returns:
        Whether there is such a kernel, and it did its work.

    Raises:
        MemoryError: it did not get the memory that it needs.
    """
    kernels = library(name)
    if kernels is None:
        return False
    if getattr(kernels, name)(*map(_passed, arguments)):
        raise MemoryError(f"the native kernel {name!r} did not get the memory it needs")
    return True


def _passed(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double | None:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return None if argument is None else ctypes.c_int64(argument)

"""Calls kernels with tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from pondera.kernels.build import library


def fit(*tensors: Tensor) -> bool:
    """Whether a kernel can read these tensors: contiguous float32 on the CPU.

    False while torch traces (`torch.compile`, fake tensors), because it cannot trace a kernel.

    Example:
        >>> fit(torch.ones(3, 4)), fit(torch.ones(3, 4).T), fit(torch.ones(3, 4).double())
        (True, False, False)
    """
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
        for x in tensors
    )


def fit_rows(*tensors: Tensor) -> bool:
    """Whether a kernel with strides can read these tensors: float32 on the CPU, contiguous last dimension, no gradient.

    Example:
        >>> fit_rows(torch.ones(3, 4)[:, 1:]), fit_rows(torch.ones(3, 4).T)
        (True, False)
    """
    if torch.compiler.is_compiling():
        return False
    gradient = torch.is_grad_enabled()
    for x in tensors:  # no generator expression: this runs for every token and layer
        if not (type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1):
            return False
        if gradient and x.requires_grad:
            return False
    return True


def run(name: str, *arguments: Tensor | int | float | None) -> bool:
    """Calls the function ``name`` of ``name.c``; the GIL is released during the call.

    Args:
        name: name of the source file and of its function, which returns an ``int``, 0 on success.
        arguments: tensors are passed as pointers to their data, `None` as NULL, ``int`` as ``int64_t`` and ``float`` as
            ``double``. They are not checked against the C signature.

    Returns:
        False if the kernel is not available, else true.

    Raises:
        MemoryError: the kernel could not allocate memory.
    """
    kernels = library(name)
    if kernels is None:
        return False
    if getattr(kernels, name)(*map(_passed, arguments)):
        raise MemoryError(f"the native kernel {name!r} could not allocate memory")
    return True


def _passed(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double | None:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return None if argument is None else ctypes.c_int64(argument)

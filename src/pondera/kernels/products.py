"""Products of one weight matrix with a few rows, with a native kernel that reads each weight once.

The reference implementation is `torch.nn.functional.linear`. For a few rows its matrix product reads weights at a third of the
speed of the memory. Each row of the result is bit-identical for any number of rows and threads.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.nn import functional as F

from pondera.kernels.build import library, why_not

FEW = 8
"""The most rows of a call; with more, products are limited by arithmetic and torch is faster."""
SETS = ("plain C", "AVX2", "AVX-512")
"""Names of the instruction sets; their indices are those of ``products.c``."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""The dtypes of weights."""


class _Products(ctypes.Structure):
    """The arguments of the kernel; the same struct is defined in ``products.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "y")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "inputs", "outputs", "kind", "by_input", "bfloat", "threads", "set")
        ),
    )


def few_rows(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, scale_O: Tensor | None = None, set_: int = -1
) -> Tensor | None:
    """``x W^T + bias`` for 1 to 8 rows on the CPU, without gradients; `None` if the kernel does not support the arguments.

    Args:
        x: ``[..., I]``, float32 or bfloat16, any strides.
        weight_OI: contiguous, or the transpose of a contiguous matrix; of the dtype of `x`, or int8.
        bias_O: of the dtype of `x`.
        scale_O: float32, the factor of each output, with int8 weights only.
        set_: index in `SETS`; default: -1, the best of this CPU, which also replaces one that it does not have.

    Example:
        >>> y = few_rows(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
        >>> y is None or y.tolist() == [[6.0]]
        True
    """
    inputs = weight_OI.shape[-1]
    if torch.is_grad_enabled() or x.numel() > FEW * inputs or not fit(x, weight_OI, bias_O, scale_O):
        return None
    kernel = library("products")
    if kernel is None:
        return None
    x = x.contiguous()
    outputs = weight_OI.shape[0]
    y = x.new_empty(*x.shape[:-1], outputs)
    arguments = _Products(
        x.data_ptr(),
        weight_OI.data_ptr(),
        None if scale_O is None else scale_O.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        y.data_ptr(),
        *(x.numel() // inputs, inputs, outputs, KINDS[weight_OI.dtype]),
        *(not weight_OI.is_contiguous(), x.dtype == torch.bfloat16),
        *(torch.get_num_threads(), set_),
    )
    if kernel.products(ctypes.byref(arguments)):
        raise MemoryError("the native kernel 'products' could not allocate memory")
    return y


def observed() -> bool:
    """Whether torch traces, counts or casts its operations now, so that a product must be one of them."""
    return torch.compiler.is_compiling() or bool(_len_torch_dispatch_stack()) or torch.is_autocast_enabled("cpu")


def fit(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor | None) -> bool:
    """Whether a kernel for products can read the arguments of `few_rows`, and nothing observes the operations of torch."""
    if observed():
        return False
    dtype, kind = x.dtype, weight_OI.dtype
    if dtype not in (torch.float32, torch.bfloat16) or kind not in (dtype, torch.int8):
        return False
    if (scale_O is None) == (kind == torch.int8) or not x.numel() or x.shape[-1] != weight_OI.shape[-1]:
        return False
    for tensor in (x, weight_OI, bias_O, scale_O):  # no generator expression: this runs for every layer of every token
        if tensor is not None and not (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"):
            return False
    if not (weight_OI.is_contiguous() or weight_OI.T.is_contiguous()) or not weight_OI.numel():
        return False
    if scale_O is not None and (scale_O.dtype != torch.float32 or not scale_O.is_contiguous()):
        return False
    return bias_O is None or (bias_O.dtype == dtype and bias_O.is_contiguous())


def instruction_set() -> str:
    """The instruction set of the kernel on this CPU; empty if the kernel is not available."""
    kernel = library("products")
    return "" if kernel is None else SETS[kernel.best_set()]


def why_not_used() -> str:
    """The reason why models do not use the kernel: it is not available, or its products are not those of torch; else empty."""
    return why_not("products") or ("" if _agrees() else "its products differ from those of torch on this machine")


@torch.inference_mode()
def _agrees() -> bool:
    """Whether the products of a small matrix are those of torch, for each dtype of weights."""
    draw = torch.Generator("cpu").manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw, device="cpu") for shape in ((3, 75), (7, 75), (7,)))
    scale, codes = weight.abs().amax(1) / 127, (weight * 50).clamp(-127, 127).to(torch.int8)
    found = few_rows(x, weight, bias), few_rows(x, codes, bias, scale), few_rows(x.bfloat16(), weight.bfloat16())
    right = F.linear(x, weight, bias), F.linear(x, codes * scale[:, None], bias), F.linear(x, weight)
    bounds = (1e-4, 1e-4, 0.1)
    return all(
        ours is not None and bool((ours - theirs).abs().max() <= bound * theirs.abs().max())
        for ours, theirs, bound in zip(found, right, bounds, strict=True)
    )

"""Products of many rows in int8: int8 weights with one scale per output, and rows in int8 with a step per group of inputs.

On a CPU with instructions for sums of int8 products, a prompt then takes less than half the time that it takes in float32.
`as_int8` is the reference: the products are those of these rows in float32, up to the order of sums.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.kernels.build import library
from pondera.kernels.call import run
from pondera.kernels.products import fit

GROUP, MOST = 32, 127
"""Inputs that share a step, and the largest code."""


def as_int8(x: Tensor) -> Tensor:
    """The rows that the kernel multiplies: each group of 32 inputs is rounded to 255 levels.

    Args:
        x: ``[..., I]``, finite.

    Example:
        >>> as_int8(torch.tensor([127.0, -1.4, 0.3])).tolist()
        [127.0, -1.0, 0.0]
    """
    rounded = []
    for part in x.float().split(GROUP, -1):
        most = part.abs().amax(-1, keepdim=True)
        codes = (part * torch.where(most > 0, MOST / most, 0.0)).round()
        rounded.append(codes * (most / MOST))
    return torch.cat(rounded, -1)


def many_rows(
    x: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, plain: bool = False
) -> Tensor | None:
    """``x W^T + bias`` for any number of rows on the CPU, with both sides in int8; `None` if the kernel does not support it.

    Each row of the result is bit-identical for any number of rows and threads. A number of x that is not finite makes its
    row NaN.

    Args:
        x: ``[..., I]``, float32 or bfloat16.
        codes_OI: int8, contiguous.
        scale_O: float32, the factor of each output.
        bias_O: of the dtype of `x`.
        plain: without instructions for int8, which is slow, for tests.

    Returns:
        ``[..., O]``, of the dtype of `x`.

    Example:
        >>> y = many_rows(torch.ones(20, 3), torch.tensor([[1, 2, 3]], dtype=torch.int8), torch.tensor([0.5]))
        >>> y is None or y[0].tolist() == [3.0]
        True
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    if not codes_OI.is_contiguous() or not fit(x, codes_OI, bias_O, scale_O):
        return None
    rows = x.float().contiguous()
    y = rows.new_empty(*x.shape[:-1], len(codes_OI))
    bias = None if bias_O is None else bias_O.float()
    count, inputs = rows.numel() // x.shape[-1], x.shape[-1]
    shape = (count, inputs, len(codes_OI), torch.get_num_threads(), int(plain))
    return y.to(x.dtype) if run("int8_rows", rows, codes_OI, scale_O, bias, y, *shape) else None


def fast() -> bool:
    """Whether this CPU has instructions for it, and the kernel is available."""
    kernel = library("int8_rows")
    return kernel is not None and bool(kernel.int8_rows_are_fast())

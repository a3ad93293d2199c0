"""Products of many rows in half precision, on a CPU that has no instructions for it.

There, torch converts numbers within its product, which takes 5 (bfloat16) to 10 times (float16) as long as in float32. Here
weights and rows are converted first. Both ways add up in float32, and round once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pondera.kernels.products import FEW, observed

INSTRUCTIONS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16", "amx_fp16", "fphp"}}
"""The names that Linux gives to instructions for products of each dtype, on x86 and on ARM."""


def in_float32(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
    """``x W^T + bias`` computed in float32; `None` if torch's own product is better or needed.

    Gradients are computed in float32, too, and weights are converted again for them instead of kept.

    Args:
        x: ``[..., I]``.
        weight_OI: of the dtype of `x`.
        bias_O: of the dtype of `x`.

    Returns:
        ``[..., O]``, of the dtype of `x`.

    Cost:
        ``O * I`` converted weights, written and read once per call, in addition to the product; so not for few rows.

    Example:
        >>> in_float32(torch.ones(20, 3), torch.ones(2, 3)) is None  # float32 needs no conversion
        True
    """
    if x.dtype not in INSTRUCTIONS or weight_OI.dtype != x.dtype or x.numel() <= FEW * weight_OI.shape[-1]:
        return None
    if x.device.type != "cpu" or weight_OI.device.type != "cpu" or not _slow(x.dtype):
        return None
    return None if observed() else _Product.apply(x, weight_OI, bias_O)


class _Product(torch.autograd.Function):
    """The product and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad = grads[0].float()
        grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
        of_x = (grad @ weight_OI.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (grad_NO.T @ x_NI.float()).to(x.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, grad_NO.sum(0).to(x.dtype) if ctx.needs_input_grad[2] else None


@cache
def _slow(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of `dtype`; only Linux says what it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    names = next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    return bool(names) and not names & INSTRUCTIONS[dtype]

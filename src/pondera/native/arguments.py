"""What kernels take: plain float32 tensors of a CPU, by their address."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

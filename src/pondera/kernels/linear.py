"""Linear layers that multiply a few rows with a native kernel while they decode, and otherwise as torch does.

In half precision, on a CPU without instructions for it, they also multiply many rows in float32 (`pondera.kernels.half`).

`use_kernels` changes the class of the linear layers of a model, and nothing else: modules, parameters, hooks and the state dict
stay the same, so a model is saved, moved, wrapped by PEFT and trained as before.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.errors import unknown
from pondera.core.hf import Conv1D
from pondera.kernels import CHOICES
from pondera.kernels.half import in_float32
from pondera.kernels.products import few_rows, why_not_used


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """``x W^T + bias``; `None` if torch's product is the one to use."""
    y = few_rows(x, weight_OI, bias_O)
    return in_float32(x, weight_OI, bias_O) if y is None else y


class NativeLinear(nn.Linear):
    """`nn.Linear` with the kernel of `pondera.kernels.products`, where that supports the call, else torch's product."""

    def forward(self, input: Tensor) -> Tensor:
        """``input W^T + bias``, ``[..., O]``."""
        y = _product(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias) if y is None else y


class NativeConv1D(Conv1D):
    """The linear layer of GPT-2, whose weight is ``[I, O]``, with the same kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W + bias``, ``[..., O]``."""
        y = _product(x, self.weight.T, self.bias)
        return super().forward(x) if y is None else y


NATIVE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NativeLinear, Conv1D: NativeConv1D}


def use_kernels(model: nn.Module, kernels: str) -> int:
    """Makes the linear layers of a model use a kernel; can be repeated and reversed.

    A layer uses the native kernel for 1 to 8 rows, without gradients, on the CPU, and may multiply more rows of half precision
    in float32. All other calls are unchanged, and so is the whole model if the kernel is not available
    (`pondera.kernels.products.why_not_used`). Classes that others derived from the two that torch and transformers have are
    left alone.

    Args:
        model: changed in place; layers that are added later, such as those of PEFT, need another call.
        kernels: ``"native"`` or ``"torch"``.

    Returns:
        The number of layers with the native kernel.

    Raises:
        UserError: no such kernels.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> use_kernels(model, "torch"), type(model[0]) is nn.Linear
        (0, True)
    """
    if kernels not in CHOICES:
        raise unknown("kernels", kernels, CHOICES)
    native = kernels == "native" and not why_not_used()
    change = NATIVE if native else {new: old for old, new in NATIVE.items()}
    count = 0
    for module in model.modules():
        new = change.get(type(module))
        if new is not None and (not native or cast(Tensor, module.weight).device.type == "cpu"):
            cast(Any, module).__class__ = new
        count += type(module) in NATIVE.values()
    return count

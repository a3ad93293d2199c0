"""Weights as int8 with one scale per output, for a model that decodes on a CPU.

A decoding step takes as long as its weights take from memory, and these are a quarter of float32. Up to 8 rows use the native
kernel of `pondera.kernels.products`; more rows multiply with the weights as floats again, so both compute the same function.
With `prompts`, more rows are rounded to int8 as well (`pondera.kernels.int8_rows`), which is faster and less exact.

Shapes: I inputs, O outputs, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.core.hf import Conv1D
from pondera.kernels.build import why_not
from pondera.kernels.int8_rows import many_rows
from pondera.kernels.linear import NativeConv1D, NativeLinear
from pondera.kernels.products import few_rows

MOST = 127
"""Codes are from -127 to 127, so the scale is symmetric."""


def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[O, I]`` and float32 scales ``[O]`` of a matrix; each weight is off by at most half a scale.

    Example:
        >>> codes, scale = quantized(torch.tensor([[1.27, -0.5, 0.001], [0.0, 0.0, 0.0]]))
        >>> codes.tolist(), round(float(scale[0]), 4)
        ([[127, -50, 0], [0, 0, 0]], 0.01)
    """
    most_O = weight_OI.detach().float().abs().amax(1)
    scale_O = torch.where(most_O > 0, most_O / MOST, 1.0)
    return (weight_OI.detach().float() / scale_O[:, None]).round().to(torch.int8), scale_O


class Int8(nn.Module):
    """What layers with int8 weights share. `weight` is computed from the codes each time it is read."""

    codes: Tensor
    scale: Tensor
    native: bool
    prompts: bool
    _dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weights as floats, in the dtype that they had."""
        return self._floats(self._dtype)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        """The weights ``[O, I]``."""
        return (self.codes * self.scale[:, None]).to(dtype)

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise UserError(
                "weights='int8': these weights cannot be trained; load the model without weights, or call eval()"
            )
        y = few_rows(input, self.codes, bias, self.scale) if self.native else None
        if y is None and self.prompts:
            y = many_rows(input, self.codes, self.scale, bias)
        return F.linear(input, self._floats(input.dtype), bias) if y is None else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(self.scale[:0]).dtype != self.scale.dtype:
            raise UserError("weights='int8': the dtype of a loaded model cannot change; give load the dtype as well")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise UserError("weights='int8': these weights are not saved; load and save the model without weights")


class Int8Linear(Int8, nn.Linear):
    """A linear layer with int8 weights."""

    def forward(self, input: Tensor) -> Tensor:
        """``input W^T + bias``, ``[..., O]``."""
        return self._product(input, self.bias)


class Int8Conv1D(Int8, Conv1D):
    """The linear layer of GPT-2 with int8 weights; its `weight` is ``[I, O]``."""

    @property
    def weight(self) -> Tensor:
        """The weights as floats, ``[I, O]``."""
        return self._floats(self._dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """``x W + bias``, ``[..., O]``."""
        return self._product(x, self.bias)


class Int8Embedding(Int8, nn.Embedding):
    """An embedding that shares the int8 weights of a tied head."""

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings, ``[..., D]``."""
        return (F.embedding(input, self.codes) * self.scale[input][..., None]).to(self._dtype)


LAYERS: dict[type[nn.Module], type[Int8]] = {
    nn.Linear: Int8Linear,
    NativeLinear: Int8Linear,
    Conv1D: Int8Conv1D,
    NativeConv1D: Int8Conv1D,
}


def use_int8(model: nn.Module, native: bool = True, prompts: bool = False) -> int:
    """Turns the weights of the linear layers of a model on the CPU into int8; this cannot be reversed.

    An embedding follows if a head shares its weights. Other embeddings and those with a scale, norms, biases, convolutions,
    experts that are not linear layers, and classes that others derived from linear layers stay as they are.

    Args:
        model: changed in place.
        native: up to 8 rows use the native kernel, if there is one.
        prompts: more rows are rounded to int8, in groups of 32 inputs.

    Returns:
        The number of layers with int8 weights.

    Raises:
        UserError: the model is not on the CPU, has weights that are not finite, or none that can be int8; or there is no native
            kernel for `prompts`.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
        >>> use_int8(model), model[0].codes.dtype
        (1, torch.int8)
    """
    if prompts and (reason := why_not("int8_rows") if native else "kernels='torch' leaves it out"):
        raise UserError(f"weights='int8-prompts': there is no native kernel for it ({reason}); give weights='int8'")
    done: dict[int, tuple[Tensor, Tensor]] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the id of one in `done`
    count = 0
    modules = sorted(model.modules(), key=lambda module: isinstance(module, nn.Embedding))  # embeddings last
    for module in modules:
        tied = type(module) is nn.Embedding and id(module.weight) in done
        new = Int8Embedding if tied else LAYERS.get(type(module))
        if new is None:
            continue
        weight = cast(Tensor, module.weight)
        if id(weight) not in done:
            _check(weight)
            done[id(weight)] = quantized(weight.T if new is Int8Conv1D else weight)
            kept.append(weight)
        layer: Any = module
        del layer._parameters["weight"]
        layer._dtype, layer.native, layer.prompts, layer.__class__ = weight.dtype, native, prompts, new
        for name, value in zip(("codes", "scale"), done[id(weight)], strict=True):
            layer.register_buffer(name, value)
        count += 1
    if not count:
        raise UserError("weights='int8': this model has no linear layers that could be int8; leave weights out")
    return count


def _check(weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise UserError(
            f"weights='int8': for a model on the CPU, and this one is on {weight.device}; give device='cpu'"
        )
    if not bool(weight.isfinite().all()):
        raise UserError("weights='int8': the model has weights that are not finite; leave weights out")

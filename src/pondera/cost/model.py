"""Cost per token: FLOPs, cache bytes and parameters, computed from a config or measured on a model.

`CostModel` needs only the config of a backbone; `measured_flops` and `live_cache_bytes` measure a running model, and the
tests compare both. `pondera.arch.families` describes the architectures and defines what counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from pondera.arch.families import DecoderPass, MatMul, describe

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig

__all__ = ["DecoderPass", "CostModel", "MatMul", "CostSchedule", "live_cache_bytes", "measured_flops"]


@dataclass(frozen=True)
class CostSchedule:
    """The operations of a method for some tokens of one sequence.

    Args:
        calls: passes through the decoder stack, and further matrix products of the method.
        head_rows: rows through the output head.
        tokens: number of processed tokens, for the cost per token.
    """

    calls: tuple[DecoderPass | MatMul, ...]
    head_rows: int
    tokens: int


class CostModel:
    """Computes the cost of a backbone from its config.

    FLOPs follow ``torch.utils.flop_counter``: a multiply-add is two; matrix products, convolutions and attention count,
    attention over the full query x key rectangle; the rest is free. The backward pass of attention depends on the attention
    implementation of the config: all but ``"eager"`` are fused kernels, which recompute the scores.

    Args:
        config: text config of the backbone.
        head: multiplications per row of the output head; default: `None`, those of the output matrix.

    Raises:
        UserError: a model type without a cost model; the message lists the known ones.

    Example:
        >>> from transformers import LlamaConfig
        >>> cost = CostModel(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        ...                              intermediate_size=96, vocab_size=97))
        >>> cost.forward(CostSchedule(calls=(DecoderPass(queries=8, keys=8),), head_rows=8, tokens=8)) / 8
        155776.0
        >>> cost.cache_bytes(slots=8)
        8192
    """

    def __init__(self, config: PretrainedConfig, head: int | None = None) -> None:
        self._stack = describe(config)
        self._head = self._stack.head if head is None else head
        self._layers = Counter(self._stack.layers)  # few are distinct, and each is computed once

    def step(self, call: DecoderPass | MatMul) -> float:
        """Forward FLOPs of one pass through the decoder stack (without output head), or of a matrix product."""
        if isinstance(call, MatMul):
            return 2.0 * call.rows * (self._head if call.weights == "head" else call.weights)
        rows = 2 * call.queries
        once = sum(n * (rows * layer.weights + layer.mixer.forward(call)) for layer, n in self._layers.items())
        return float(self._times(call) * once)

    def head(self, rows: int) -> float:
        """Forward FLOPs of the output head on `rows` rows."""
        return 2.0 * self._head * rows

    def forward(self, schedule: CostSchedule) -> float:
        """Forward FLOPs of a schedule."""
        return self.head(schedule.head_rows) + sum(self.step(call) for call in schedule.calls)

    def training(self, schedule: CostSchedule) -> float:
        """Forward and backward FLOPs of a schedule, with all parameters trainable and without recomputation."""
        return self.forward(schedule) + 2 * self.head(schedule.head_rows) + sum(map(self._backward, schedule.calls))

    def _backward(self, call: DecoderPass | MatMul) -> float:
        if isinstance(call, MatMul):
            return 2 * self.step(call) if call.trained else 0.0
        # Twice the forward pass: gradients of the weights and, because the embedding is trained, of the input.
        rows = 4 * call.queries
        once = sum(n * (rows * layer.weights + layer.mixer.backward(call)) for layer, n in self._layers.items())
        return float(self._times(call) * once)

    def _times(self, call: DecoderPass) -> float:
        """Number of passes through the whole stack; a part of the layers counts as a fraction."""
        count = len(self._stack.layers)
        return call.repeats * (count if call.layers is None else call.layers) / count

    def cache_bytes(self, slots: int, dtype_bytes: int = 4, drops_window_rows: bool = True, newest: int = 1) -> int:
        """Bytes of a ``DynamicCache(config=config)`` for one sequence after `slots` KV slots.

        Sliding-window layers store at most their window (as after any decode step; a longer prompt in one call stays in
        memory until then), and linear-attention layers store states of fixed size.

        Args:
            slots: KV slots that the decoder has processed.
            dtype_bytes: bytes per number: 4 for float32, 2 for bfloat16.
            drops_window_rows: false if the cache masks rows outside of a sliding window instead of dropping them.
            newest: KV slots of the newest call, which stay in the storage of a sliding-window layer.
        """
        return sum(
            n * layer.mixer.cache_bytes(slots, dtype_bytes, drops_window_rows, newest)
            for layer, n in self._layers.items()
        )

    def parameters(self) -> dict[str, int]:
        """Number of parameters: ``embedding`` (with learned positions), ``head`` (0 if tied), ``body``, and ``total``."""
        stack = self._stack
        body = stack.norm + sum(layer.weights + layer.extra for layer in stack.layers)
        head = 0 if stack.tied else stack.head
        return {"total": stack.embedding + head + body, "embedding": stack.embedding, "head": head, "body": body}


def measured_flops(fn: Callable[[], Any]) -> int:
    """Measures the FLOPs of a call of `fn` with the ``FlopCounterMode`` of torch.

    Three formulas correct the counter: it misses the fused attention on CPUs and the grouped matrix product of expert layers,
    and it ignores the groups in the weight gradient of a grouped convolution.

    Example:
        >>> import torch
        >>> measured_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
        120
    """
    import torch
    from torch.utils import flop_counter

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

    def grouped_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[-1]

    def convolution_backward(grad: Any, x: Any, w: Any, *rest: Any, **_: Any) -> int:
        transposed, (of_input, of_weight, _of_bias) = rest[4], rest[7]  # the triple says which gradients are requested
        return (of_input + of_weight) * flop_counter.conv_flop_count(x, w, grad, transposed)

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten._grouped_mm: grouped_product,
        aten.convolution_backward: convolution_backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        fn()
    return counter.get_total_flops()


def live_cache_bytes(cache: Cache) -> int:
    """Measures the bytes of all tensor storages in the layers of a cache, each storage once.

    Counts all tensors in attributes of the layers, also inside lists, tuples, dicts and nested layers. A view counts with
    its whole storage.

    Example:
        >>> import torch
        >>> from transformers import DynamicCache
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), layer_idx=0)
        >>> live_cache_bytes(cache)
        640
    """
    storages = (tensor.untyped_storage() for layer in cache.layers for tensor in _tensors(vars(layer)))
    return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "get_seq_length") or is_dataclass(value):  # a nested layer, or a part of a layer
        yield from _tensors(vars(value))

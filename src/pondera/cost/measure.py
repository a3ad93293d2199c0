"""FLOPs and cache bytes, measured on a live model; the tests hold `pondera.cost.model.CostModel` to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Cache


def measured_flops(fn: Callable[[], Any]) -> int:
    """FLOPs that torch's ``FlopCounterMode`` sees while `fn` runs.

    Three formulas correct the counter: it misses the CPU's fused attention and the grouped product of expert layers, and in
    the weight gradient of a grouped convolution it ignores the groups and
    charges a depthwise one a channel count too often.

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
        transposed, (of_input, of_weight, _of_bias) = rest[4], rest[7]  # the triple: which gradients are wanted
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
    """Bytes of every tensor storage that a cache's layers hold, each storage once.

    Counts whatever tensors the layers have as attributes, also inside lists, tuples, dicts and layers of layers. A view
    counts with the whole storage that it keeps alive.

    Example:
        >>> import torch
        >>> from transformers import DynamicCache
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), layer_idx=0)
        >>> live_cache_bytes(cache)
        640
    """
    return storage_bytes([vars(layer) for layer in cache.layers])


def storage_bytes(value: Any) -> int:
    """Bytes of every tensor storage in a value (see `tensors_in`), each storage once.

    Example:
        >>> import torch
        >>> rows = torch.zeros(4, 8)
        >>> storage_bytes({"all": rows, "some": [rows[:2], None, 3]})
        128
    """
    storages = (tensor.untyped_storage() for tensor in tensors_in(value))
    return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value: in lists, tuples, dicts, dataclasses, caches and cache layers of any depth."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "reorder_cache") or is_dataclass(value):  # a cache, a layer, or a part of one
        yield from tensors_in(vars(value))

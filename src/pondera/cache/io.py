"""Saves a cache to a safetensors file and loads it, so that a later process can continue the sequences.

The state of a layer consists of numbers, strings, lists, mappings, tensors, and objects of the classes in `HOLDERS`. The
file stores tensors unchanged, and the rest as JSON in its header. Loading never executes code from the file.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pondera.cache.codec import Codes
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import KVLayer
from pondera.cache.ring_buffer import RingBuffer
from pondera.core.errors import UserError
from pondera.core.run_folder import write_atomic

HOLDERS = {holder.__name__: holder for holder in (KVStore, RingBuffer, Codes)}
STOCK = ("keys", "values", "cumulative_length")
"""The state of transformers' own layers, which a KV-cache method does not compress."""
_TENSOR, _HOLDER, _TUPLE = "tensor", "holder", "tuple"


def save(layers: list[Any], method: str, path: str | Path) -> Path:
    """Writes a cache into a file.

    Args:
        layers: the layers of the cache.
        method: the spec string of the method that created them.
        path: the file.

    Raises:
        UserError: the cache may contain draft tokens, which a later `crop` may roll back.
    """
    from safetensors.torch import save as to_bytes

    if any(layer.record_past for layer in layers if isinstance(layer, KVLayer)):
        raise UserError(
            "a cache that contains draft tokens is not saved: crop(0) keeps them, crop(-n) rolls back the last n"
        )
    tensors: dict[str, Tensor] = {}
    states = [
        {name: _plain(getattr(layer, name), tensors) for name in _names(layer) if hasattr(layer, name)}
        for layer in layers
    ]
    metadata = {"method": method, "layers": json.dumps(states)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_bytes(tensors, metadata))
    return path


def load(layers: list[Any], method: str, path: str | Path) -> None:
    """Loads the state that `save` wrote into the layers of an empty cache.

    Args:
        layers: the layers of a cache of the same model.
        method: the spec string of the method; it must equal the saved one.
        path: the file.

    Raises:
        UserError: the file does not exist, or is of another method or another kind of model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described = metadata["method"]
        states = [
            {name: _built(value, tensors) for name, value in one.items()} for one in json.loads(metadata["layers"])
        ]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; write it with cache.save({str(path)!r})") from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a saved cache ({error}); write one with cache.save") from None
    if described != method:
        raise UserError(
            f"{path}: contains a cache of {described}, and this is a cache of {method}; use the method of the file"
        )
    names = [[name for name in _names(layer) if name in state] for layer, state in zip(layers, states, strict=False)]
    if len(states) != len(layers) or any(list(state) != own for state, own in zip(states, names, strict=True)):
        raise UserError(f"{path}: contains {len(states)} layers of another kind of model; load it for the same model")
    for layer, state in zip(layers, states, strict=True):
        for name, value in state.items():
            setattr(layer, name, value)
        rows = next((value for value in _tensors(state) if value.is_floating_point()), None)
        if rows is not None:
            layer.dtype, layer.device, layer.is_initialized = rows.dtype, rows.device, True


def _names(layer: Any) -> tuple[str, ...]:
    return ("seen", *layer.holds) if isinstance(layer, KVLayer) else STOCK


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Converts a value to JSON types; moves its tensors into `tensors` and refers to them by name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone().contiguous()
        return {_TENSOR: name}
    if type(value).__name__ in HOLDERS:
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        return {_HOLDER: type(value).__name__, "of": _plain(inner, tensors)}
    if isinstance(value, dict):
        return {"of": {name: _plain(each, tensors) for name, each in value.items()}}
    if isinstance(value, list | tuple):
        plain = [_plain(each, tensors) for each in value]
        return {_TUPLE: plain} if isinstance(value, tuple) else plain
    return value


def _built(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_built(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_built(each, tensors) for each in value[_TUPLE])
    if _HOLDER in value:
        return HOLDERS[value[_HOLDER]](**_built(value["of"], tensors))
    return {name: _built(each, tensors) for name, each in value["of"].items()}


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a value of a layer's state."""
    if isinstance(value, Tensor):
        return [value]
    if type(value).__name__ in HOLDERS:
        value = vars(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]

"""A cache on disk: what its layers hold, as safetensors, to be read on from later or elsewhere.

What a layer holds is numbers, words, lists, mappings, tensors, and the few classes of `HOLDERS`. Tensors go into the file
as they are; the rest is JSON in its header, which nothing is ever executed from.
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
"""What layers of transformers hold: those that a memory leaves as they are."""
_TENSOR, _HOLDER, _TUPLE = "tensor", "holder", "tuple"


def save(layers: list[Any], method: str, path: str | Path) -> Path:
    """Writes a cache into a file.

    Args:
        layers: of the cache.
        method: describes what made them.
        path: the file.

    Raises:
        UserError: tokens are being recorded as drafts, and nobody knows yet which of them stay.
    """
    from safetensors.torch import save as to_bytes

    if any(layer.record_past for layer in layers if isinstance(layer, KVLayer)):
        raise UserError("a cache that holds drafts is not saved: crop(0) keeps them, crop(-n) takes the last n back")
    tensors: dict[str, Tensor] = {}
    held = [
        {name: _plain(getattr(layer, name), tensors) for name in _names(layer) if hasattr(layer, name)}
        for layer in layers
    ]
    told = {"method": method, "layers": json.dumps(held)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_bytes(tensors, told))
    return path


def load(layers: list[Any], method: str, path: str | Path) -> None:
    """Fills the layers of an empty cache with what `save` wrote.

    Args:
        layers: of the same model.
        method: describes what made them, as it did when they were saved.
        path: the file.

    Raises:
        UserError: no such file, or another memory's, or another model's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described = told["method"]
        found = [{name: _built(value, tensors) for name, value in one.items()} for one in json.loads(told["layers"])]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; write it with cache.save({str(path)!r})") from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: this is no cache that was saved ({error})") from None
    if described != method:
        raise UserError(f"{path}: holds a cache of {described}, and this is one of {method}; use that method")
    names = [[name for name in _names(layer) if name in held] for layer, held in zip(layers, found, strict=False)]
    if len(found) != len(layers) or any(list(held) != own for held, own in zip(found, names, strict=True)):
        raise UserError(f"{path}: holds {len(found)} layers of another kind of model; load it for the model it is of")
    for layer, held in zip(layers, found, strict=True):
        for name, value in held.items():
            setattr(layer, name, value)
        rows = next((value for value in _tensors(held) if value.is_floating_point()), None)
        if rows is not None:
            layer.dtype, layer.device, layer.is_initialized = rows.dtype, rows.device, True


def _names(layer: Any) -> tuple[str, ...]:
    return ("seen", *layer.holds) if isinstance(layer, KVLayer) else STOCK


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The same without tensors, which are put aside under a name."""
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
    """The way back."""
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
    """All tensors in what a layer holds."""
    if isinstance(value, Tensor):
        return [value]
    if type(value).__name__ in HOLDERS:
        value = vars(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]

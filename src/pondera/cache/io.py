"""Saves a cache to a safetensors file and loads it, so that a later process can continue the sequences.

The file contains what `pondera.cache.state` names as the state of the cache and of its layers, and all attributes of layers of
transformers. Tensors are stored unchanged, and the rest as JSON in the header of the file. A file is loaded into an empty
cache of the same model, which already has the layers. Loading never executes code from the file: it creates objects of the
classes in `HOLDERS` only, and sets no other attributes than those of the state.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pondera.cache.codec import Codes
from pondera.cache.coded_slots import CodedSlots
from pondera.cache.columns import Columns, DepthSlots
from pondera.cache.file_checks import check_numbers
from pondera.cache.identity import differences
from pondera.cache.kv_store import KVStore
from pondera.cache.layer import KVLayer
from pondera.cache.ring_buffer import RingBuffer
from pondera.cache.state import BatchState, CacheState, batch_sizes, state_of
from pondera.core.errors import UserError
from pondera.core.hf import Cache
from pondera.core.run_folder import write_atomic
from pondera.cost.measure import tensors_in

HOLDERS = {holder.__name__: holder for holder in (KVStore, RingBuffer, Codes, CodedSlots, DepthSlots, Columns)}
NOT_STATE = ("dtype", "device", "hold", "record_past")
"""Attributes of layers of transformers that are not saved: they follow from the tensors, or belong to running calls."""
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
"""What loading a damaged file may raise; a `RecursionError` is a `RuntimeError`."""
_TENSOR, _HOLDER, _STATE, _TUPLE, _DICT, _OF = "tensor", "holder", "state", "tuple", "dict", "of"


def save(cache: Any, methods: str, path: str | Path) -> Path:
    """Writes a cache into a file.

    Args:
        cache: the cache: a `BatchState` with `layers`.
        methods: the spec strings of the methods that fill it.
        path: the file.

    Raises:
        UserError: the cache may contain draft tokens, which a later `crop` may roll back, or the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    if any(_may_roll_back(layer) for layer in cache.layers):
        raise UserError(
            "a cache that contains draft tokens is not saved: crop(0) keeps them, crop(-n) rolls back the last n"
        )
    tensors: dict[str, Tensor] = {}
    metadata = {"methods": methods, "model": cache.model, "cache": json.dumps(_plain(cache, tensors))}
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_bytes(tensors, metadata))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    return path


def _may_roll_back(layer: Any) -> bool:
    """Whether a layer contains tokens that may be draft tokens."""
    if isinstance(layer, KVLayer) or not getattr(layer, "record_past", False):
        return getattr(layer, "drafted", False)
    # Layers of transformers: the next `crop` shortens what they contain in case of a rollback.
    keys, states = getattr(layer, "keys", None), getattr(layer, "conv_states", {})
    widths = getattr(layer, "conv_kernel_size", {})
    longer = keys is not None and keys.shape[-2] >= getattr(layer, "sliding_window", torch.inf)
    return longer or any(part is not None and part.shape[-1] > widths[at] for at, part in states.items())


def load(cache: Any, methods: str, path: str | Path, device: torch.device) -> None:
    """Loads the state that `save` wrote into an empty cache of the same model.

    Args:
        cache: the empty cache.
        methods: the spec strings of the methods that fill it; they must equal the saved ones.
        path: the file.
        device: the device of the loaded tensors.

    Raises:
        UserError: the file does not exist, or is of another method or another kind of model.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; write it with cache.save({str(path)!r})")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        described, plain = metadata["methods"], json.loads(metadata["cache"])
        other = differences(metadata["model"], cache.model)
    except (SafetensorError, OSError, *_DAMAGED) as error:
        raise _not_saved(path, error) from None
    if described != methods:
        raise UserError(
            f"{path}: contains a cache of {described}, and this is a cache of {methods}; use the method of the file"
        )
    try:
        _loaded(plain, cache, tensors)
        if other:
            raise _OtherModel("; ".join(other))
        check_numbers(cache)
        sizes = {size for size in batch_sizes(cache) if size}
        if len(sizes) > 1:
            raise ValueError(f"parts with {' and '.join(map(str, sorted(sizes)))} batch rows")
    except _OtherModel as error:
        raise UserError(f"{path}: belongs to another kind of model ({error}); load it for the same model") from None
    except _DAMAGED as error:
        raise _not_saved(path, error) from None


def _not_saved(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a saved cache ({error}); write one with cache.save")


class _OtherModel(Exception):
    """The file has other layers than the cache."""


def _attributes(value: Any) -> dict[str, Any]:
    """The state of a cache or a layer, also of a layer of transformers."""
    if isinstance(value, BatchState):
        return state_of(value)
    return {name: part for name, part in vars(value).items() if name not in NOT_STATE}


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Converts a value to JSON types; moves its tensors into `tensors` and refers to them by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone().contiguous()
        return {_TENSOR: name}
    kind = type(value).__name__
    if kind in HOLDERS:
        inner = {field.name: _plain(getattr(value, field.name), tensors) for field in fields(value)}
        return {_HOLDER: kind, _OF: inner}
    if isinstance(value, dict):
        return {_DICT: [[key, _plain(part, tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        plain = [_plain(part, tensors) for part in value]
        return {_TUPLE: plain} if isinstance(value, tuple) else plain
    if hasattr(value, "reorder_cache"):
        return {_STATE: kind, _OF: {name: _plain(part, tensors) for name, part in _attributes(value).items()}}
    raise UserError(f"save: a cache that contains a {kind} has no file format; run its tokens again instead")


def _loaded(plain: Any, target: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_plain`. A cache or layer is loaded into `target`, the one at its place in the empty cache."""
    is_state = isinstance(plain, dict) and _STATE in plain
    if is_state or hasattr(target, "reorder_cache"):
        if not is_state:
            raise _OtherModel(f"nothing where this model has a {type(target).__name__}")
        return _filled(target, plain[_STATE], plain[_OF], tensors)
    if isinstance(plain, list):
        targets = target if isinstance(target, list) and target else [None] * len(plain)
        if len(targets) != len(plain):
            raise _OtherModel(f"{len(plain)} layers where this model has {len(targets)}")
        return [_loaded(part, at, tensors) for part, at in zip(plain, targets, strict=True)]
    if not isinstance(plain, dict):
        if isinstance(target, bool | int | float | str) and type(plain) is not type(target):
            raise TypeError(f"{plain!r} is not of type {type(target).__name__}")
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(_loaded(plain[_TUPLE], None, tensors))
    if _DICT in plain:
        return {key: _loaded(part, None, tensors) for key, part in plain[_DICT]}
    if _HOLDER in plain:
        holder, inner = HOLDERS[plain[_HOLDER]], plain[_OF]
        if list(inner) != [field.name for field in fields(holder)]:
            raise KeyError(f"{plain[_HOLDER]} with {', '.join(inner)}")
        made = object.__new__(holder)
        vars(made).update({name: _loaded(part, None, tensors) for name, part in inner.items()})
        if isinstance(made, BatchState):
            made.derive()
        return made
    raise KeyError(", ".join(plain))


def _filled(target: Any, kind: str, states: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Loads the attributes of a cache or layer."""
    if type(target).__name__ != kind or list(states) != list(_attributes(target)):
        here = "nothing" if target is None else f"a {type(target).__name__}"
        raise _OtherModel(f"a {kind} where this model has {here}")
    if isinstance(target, CacheState) and target.by_row:
        target.prepare(len(states[target.by_row[0]]))
    for name, part in states.items():
        setattr(target, name, _loaded(part, getattr(target, name), tensors))
    if not isinstance(target, Cache):
        _mark(target)
    return target


def _mark(layer: Any) -> None:
    """Sets what a layer derives from its first keys."""
    rows = next((each for each in tensors_in(_attributes(layer)) if each.is_floating_point()), None)
    if rows is not None:
        layer.dtype, layer.device, layer.is_initialized = rows.dtype, rows.device, True

"""The state of caches and cache layers: a class names its attributes, and the operations on batch rows follow from the names.

A class states once what it stores: in `BatchState.holds`, in `BatchState.by_row`, or as the fields of a dataclass. Selecting
and repeating batch rows, counting bytes and saving (`pondera.cache.io`) are written here once and use these names. A class
adds only what differs: its empty state (`clear`) and how it removes tokens (`rollback`).

A value of the state is one of these:

- a tensor, with the batch as its first dimension;
- a number, a string or `None`, for all batch rows together;
- another `BatchState`, or a cache layer of transformers;
- a list, tuple or dict of such values. Numbers in lists and tuples are refused: they may be one per batch row.

Shapes: B batch.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self

import torch
from torch import LongTensor, Tensor

from pondera.core.errors import UserError
from pondera.core.hf import CacheLayerMixin
from pondera.cost.measure import storage_bytes

PLAIN = (bool, int, float, str, type(None))
"""The types of values for all batch rows together."""


class BatchState:
    """A state with batch rows."""

    holds: ClassVar[tuple[str, ...]] = ()
    """The names of the attributes that are the state; the fields of a dataclass need not be named."""

    by_row: ClassVar[tuple[str, ...]] = ()
    """The names of further attributes of the state: lists of any Python values, one for each batch row."""

    shared: ClassVar[tuple[str, ...]] = ()
    """The names of attributes that copies share, because no call changes them."""

    def select(self, rows: Tensor) -> None:
        """Keeps these batch rows, in this order; a row may occur several times.

        Args:
            rows: indices, or a boolean for each row.
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        for name in names_of(type(self)):
            value = getattr(self, name)
            if name in self.by_row:
                selected = [_copied(value[row]) for row in rows.tolist()]
            else:
                try:
                    selected = _selected(value, rows)
                except _UnknownRows as error:
                    raise TypeError(f"{type(self).__name__}.{name}: {error}; name it in by_row") from None
            setattr(self, name, selected)
        self.derive()

    def derive(self) -> None:
        """Sets attributes that follow from the state; called after rows were selected or the state was loaded."""

    def clone(self) -> Self:
        """A copy; it shares only the attributes in `shared`."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for name in self.shared:
            if (value := getattr(self, name, None)) is not None:
                memo.setdefault(id(value), value)  # copied already if the same call of deepcopy copies its owner
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def nbytes(self) -> int:
        """Bytes of the storage of all tensors of the state, including its unused part."""
        return storage_bytes(state_of(self))

    def batch(self) -> int:
        """B; 0 if nothing is stored."""
        if self.by_row:
            return len(getattr(self, self.by_row[0]))
        return next(filter(None, batch_sizes(self)), 0)


class CacheState(BatchState):
    """What transformers asks of caches and of cache layers, from the state and two hooks: `clear` and `rollback`."""

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorders the batch rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these batch rows."""
        if self.batch():
            self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row."""
        self.batch_select_indices(torch.arange(self.batch()).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Rolls back the last tokens (a negative number, as in transformers); 0 keeps all recorded tokens, and evicts.

        Raises:
            UserError: the number is positive, or more tokens than have been seen or can be rolled back.
        """
        kept = kept_after(self.get_seq_length(), tokens_to_remove)
        if self.batch():
            self.check_rollback(kept)
            self.rollback(kept)
        self.set_length(kept)

    @abstractmethod
    def get_seq_length(self) -> int:
        """The number of tokens seen."""

    def check_rollback(self, tokens: int) -> None:  # noqa: B027 (optional)
        """Raises if `rollback` would refuse, before anything changes.

        Raises:
            UserError: more tokens than can be rolled back.
        """

    def rollback(self, tokens: int) -> None:
        """Rolls back to the first `tokens` tokens, then evicts what was kept only in case of a rollback."""
        raise NotImplementedError(f"{type(self).__name__}: its cache determines what it removes")

    def set_length(self, tokens: int) -> None:
        """Sets the number of tokens seen, after a rollback."""

    @abstractmethod
    def clear(self) -> None:
        """Sets the attributes of the state to those of an empty cache or layer."""

    def reset(self) -> None:
        """Resets to the initial state."""
        self.clear()

    def prepare(self, batch: int) -> None:
        """Called before a saved state with this many batch rows is loaded; creates what it is loaded into."""


class CacheLayer(CacheState, CacheLayerMixin):
    """Base class of Pondera's cache layers."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Sets dtype and device to those of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_max_length(self) -> int:
        """-1: the length is unlimited."""
        return -1

    def reset(self) -> None:
        """Resets the layer to its initial state."""
        super().reset()
        self.is_initialized = False


def kept_after(seen: int, tokens_to_remove: int) -> int:
    """The number of tokens that stay after `crop`.

    Raises:
        UserError: the number is positive, or more tokens than have been seen.
    """
    if tokens_to_remove > 0:
        raise UserError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number, or 0")
    if seen + tokens_to_remove < 0:
        raise UserError(f"crop({tokens_to_remove}): only {seen} tokens have been seen")
    return seen + tokens_to_remove


@functools.cache
def names_of(kind: type[BatchState]) -> tuple[str, ...]:
    """The names of the attributes that are the state of a class."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else (*kind.holds, *kind.by_row)


def state_of(state: BatchState) -> dict[str, Any]:
    """The attributes that are the state, by name."""
    return {name: getattr(state, name) for name in names_of(type(state))}


def batch_sizes(value: Any) -> Iterator[int]:
    """The batch size of every part of a state: all are equal, except 0 for a part that stores nothing."""
    if isinstance(value, Tensor):
        yield len(value)
    elif isinstance(value, BatchState):
        for name in names_of(type(value)):
            part = getattr(value, name)
            if name in value.by_row:
                yield len(part)
            elif not isinstance(part, PLAIN):
                yield from batch_sizes(part)
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from batch_sizes(part)


class _UnknownRows(Exception):
    """A value whose batch rows are not known."""


def _selected(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows.to(value.device)]
    if isinstance(value, PLAIN):
        return value
    if hasattr(value, "reorder_cache"):  # also a layer of transformers; one without tokens does nothing
        value.reorder_cache(rows)
        return value
    if isinstance(value, BatchState):
        value.select(rows)
        return value
    if isinstance(value, dict):
        return {key: _selected(part, rows) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not any(part is not None and isinstance(part, PLAIN) for part in value):
        return type(value)(_selected(part, rows) for part in value)
    raise _UnknownRows(f"the batch rows of a {type(value).__name__} of this kind are not known")


def _copied(value: Any) -> Any:
    """A copy of the value of one batch row, so that a repeated row does not share it."""
    return value.clone() if hasattr(value, "clone") else copy.copy(value)

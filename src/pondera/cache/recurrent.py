"""Recurrent states of batch rows that have padding where other rows have a token.

A decoder with linear attention ignores padding in a call with several slots, but not in a call with one slot, which is the
usual step of decoding. A method that rolls out a prompt slot by slot makes such calls on padding.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

STATES = ("conv_states", "recurrent_states")
"""The attributes of layers of transformers: dicts of tensors ``[B, ...]``, or `None` before the first call."""


@contextmanager
def kept_rows(layers: list, real_B: Tensor | None) -> Iterator[None]:
    """Calls inside do not change the recurrent states of the rows that are padding.

    Args:
        layers: the layers of the cache; those without a recurrent state are not changed here.
        real_B: true where the row has a token; `None`: everywhere.
    """
    parts = [part for layer in layers for name in STATES if (part := getattr(layer, name, None)) is not None]
    if not parts or real_B is None or bool(real_B.all()):
        yield
        return
    before = [{index: state if state is None else state.clone() for index, state in part.items()} for part in parts]
    yield
    for part, old in zip(parts, before, strict=True):
        for index, state in part.items():
            if state is not None:
                state.copy_(_merged(state, old[index], real_B.to(state.device)))


def _merged(state: Tensor, old: Tensor | None, real_B: Tensor) -> Tensor:
    """The new state of rows with a token, and the old one of the others; a state that did not exist is 0."""
    if old is None:
        old = torch.zeros_like(state)
    # While past inputs are recorded, the inputs of a convolution grow at the end.
    old = F.pad(old, (state.shape[-1] - old.shape[-1], 0))
    return torch.where(real_B.view(-1, *[1] * (state.ndim - 1)), state, old)

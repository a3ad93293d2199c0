"""Keys and values of some tokens of a cache layer that keeps all tokens: read, and appended without a call of the model.

Shapes: B batch, G KV heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.hf import DynamicLayer


def keeps_all(layer: Any) -> bool:
    """Whether a layer stores all keys and values and nothing else, as in the stock cache or in `PreallocatedCache`."""
    if isinstance(layer, KVStoreLayer):
        return getattr(layer.method, "saves", None) == "nothing" and all(table.whole for table in layer.tables)
    return type(layer) is DynamicLayer


def sequences(layer: Any) -> int:
    """The number of batch rows of a layer; 0 if it stores nothing."""
    if isinstance(layer, KVStoreLayer):
        return layer.batch()
    return len(layer.keys) if layer.get_seq_length() else 0


def has_padding(layer: Any) -> bool:
    """Whether a layer knows that some of its tokens are padding; a layer of transformers does not."""
    return isinstance(layer, KVStoreLayer) and not all(bool(table.real.all()) for table in layer.tables)


def rows_from(layer: Any, first: int) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values ``[B, G, T, D]`` of token `first` and all later ones, in a layer that `keeps_all`."""
    keys, values = layer.joined() if isinstance(layer, KVStoreLayer) else (layer.keys, layer.values)
    return keys[:, :, first:].clone(), values[:, :, first:].clone()


def append(layer: Any, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
    """Appends keys (after rotary embedding) and values of tokens, without padding, to a layer that `keeps_all`."""
    if not isinstance(layer, KVStoreLayer):
        layer.update(key_BGTD, value_BGTD)
        return
    B, _, T, _ = key_BGTD.shape
    position_BT = torch.arange(layer.seen, layer.seen + T, device=key_BGTD.device).expand(B, T)
    layer.renew()
    for table in layer.tables:
        table.append(key_BGTD[:, table.part], value_BGTD[:, table.part], position_BT)
    layer.seen += T

"""Tells cache layers which tokens of each call are among given ones, e.g. those that end a sentence.

Layers see keys and values only. A hook on the decoder looks at the tokens of a call before they are read; where the decoder
gets vectors, it compares them with the embeddings of the given tokens.

Shapes: B batch, T tokens, E given token ids, D width of embeddings.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import CACHE, PreTrainedModel
from pondera.methods.kv_cache.base import KVCache

MARKED, COMING = "marked", "coming"
"""The names in `KVStoreLayer.state` of ``[B, seen]``, the marks of tokens seen, and ``[B, T]``, those of a call that begins."""


@runtime_checkable
class Marking(Protocol):
    """A method whose layers get marked tokens."""

    marks: list[int]


def mark_tokens(model: PreTrainedModel) -> None:
    """Sets the hook, once per model; it does nothing in calls with caches of other methods."""
    decoder = model.get_decoder()
    if not any(hook is _before_call for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_before_call, with_kwargs=True)


def _before_call(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives every layer the tokens of a call."""
    cache = kwargs.get(CACHE)
    if not isinstance(cache, KVCache) or not isinstance(cache.method, Marking):
        return
    given: Any = kwargs.get("inputs_embeds")
    given = kwargs.get("input_ids", next(iter(args), None)) if given is None else given
    marked_BT = among(decoder, given.detach(), cache.method.marks)
    for layer in cache.kept:
        assert isinstance(layer, KVStoreLayer)
        layer.state[COMING] = marked_BT


def marked(layer: KVStoreLayer, start: int, tokens: int) -> Tensor:
    """``[B, seen]``: which of the tokens seen are marked, those of the running call included.

    Args:
        layer: the layer.
        start: the number of tokens before the call.
        tokens: the number of tokens of the call.

    Raises:
        UserError: the decoder has read tokens without the hook that marks them.
    """
    coming_BT = layer.state.get(COMING)
    if coming_BT is not None and coming_BT.shape[1] == tokens:
        earlier = layer.state.get(MARKED, coming_BT[:, :0])[:, :start]
        layer.state[MARKED], layer.state[COMING] = torch.cat([earlier, coming_BT], dim=1), coming_BT[:, :0]
    if MARKED not in layer.state or layer.state[MARKED].shape[1] != start + tokens:
        raise UserError(
            f"{type(layer.method).__name__}: the decoder read tokens without passing its cache by name; call the model itself"
        )
    return layer.state[MARKED]


def roll_back_marks(layer: KVStoreLayer) -> int:
    """Deletes the marks of tokens that were rolled back; returns their number."""
    marked_BK = layer.state[MARKED]
    layer.state[MARKED] = marked_BK[:, : layer.seen]
    return marked_BK.shape[1] - layer.seen


@torch.no_grad()
def among(decoder: Any, given: Tensor, marks: list[int]) -> Tensor:
    """``[B, T]``: which tokens are among the given ones.

    Args:
        decoder: embeds tokens.
        given: token ids ``[B, T]``, or their embeddings ``[B, T, D]``.
        marks: the given token ids.
    """
    marks_E = torch.tensor(marks, dtype=torch.long, device=given.device)
    if given.ndim == 2:
        return torch.isin(given, marks_E)
    rows_ED = decoder.get_input_embeddings()(marks_E).to(given.dtype)
    maybe_BT = torch.isin(given[..., 0], rows_ED[:, 0])  # few are compared in full
    found_BT = torch.zeros_like(maybe_BT)
    found_BT[maybe_BT] = (given[maybe_BT][:, None] == rows_ED).all(-1).any(-1)
    return found_BT

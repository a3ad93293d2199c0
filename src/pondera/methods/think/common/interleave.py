"""Interleaved slots: several adjacent slots per token, with the matching masks, positions and cache.

Shapes: B batch, T tokens, N slots per token, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.cache.token_cache import TokenCache
from pondera.core.effort import Effort
from pondera.core.errors import UserError
from pondera.core.hf import DynamicCache
from pondera.models.backbone import Backbone
from pondera.models.method import SlotMaker


def interleave(stages: list[Tensor]) -> Tensor:
    """``N x [B, T, D]`` -> ``[B, T*N, D]``: x1 z1 x2 z2 ...

    Example:
        >>> interleave([torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[10.0], [20.0]]])]).flatten().tolist()
        [1.0, 10.0, 2.0, 20.0]
    """
    return torch.stack(stages, dim=2).flatten(1, 2) if len(stages) > 1 else stages[0]


def deinterleave(h_BSD: Tensor, slots: int) -> list[Tensor]:
    """The inverse of `interleave`."""
    return list(h_BSD.unflatten(1, (-1, slots)).unbind(2))


def per_slot(x_BT: Tensor | None, slots: int) -> Tensor | None:
    """Repeats a token-level mask or positions for each slot of the token."""
    return x_BT if x_BT is None or slots == 1 else x_BT.repeat_interleave(slots, dim=1)


def interleaved_pass(
    backbone: Backbone,
    stages: list[Tensor],
    mask: Tensor | None,
    position_ids: Tensor,
    cache: TokenCache | None = None,
) -> list[Tensor]:
    """One causal pass over interleaved slots; returns each stage's states, ``N x [B, T, D]``.

    Args:
        backbone: runs the pass.
        stages: the input vectors of slot 0, 1, ... of every token.
        mask: token mask over cached and new tokens, or ``None``.
        position_ids: token positions; all slots of a token share one position.
        cache: the keys and values of the new slots are appended to it.
    """
    slots = len(stages)
    if cache is not None:
        cache.hold()
    h_BSD = backbone.step(
        interleave(stages),
        cache=cache.slots if cache is not None else None,
        mask=per_slot(mask, slots),
        position_ids=per_slot(position_ids, slots),
    )
    return deinterleave(h_BSD, slots)


def interleaved_cache(backbone: Backbone, slots: int, kv_cache: SlotMaker | None = None) -> TokenCache:
    """An empty cache with the backbone's layer types, or a KV-cache method's, and `slots` KV slots per token."""
    if kv_cache is not None:
        return kv_cache.token_cache(backbone.lm, slots)
    return TokenCache(DynamicCache(config=backbone.config).layers, slots)


def slots_allowed(slots: int, budget: Effort, cache: TokenCache | None) -> int:
    """Slots per token under a budget; the first call on a cache fixes the number for all later calls.

    Args:
        slots: the method's slots per token.
        budget: the budget of this call.
        cache: the cache of this call, or ``None``.

    Raises:
        UserError: an earlier call filled the cache under another budget.
    """
    wanted = budget.passes(slots)
    if cache is None:
        return wanted
    if cache.tokens == 0:
        cache.slots_per_token = wanted
    if cache.slots_per_token != wanted:
        raise UserError(
            f"budget: the cache was filled with {cache.slots_per_token} passes per token and this call wants {wanted}; "
            "keep effort and max_passes as they were, or start with a new cache"
        )
    return wanted

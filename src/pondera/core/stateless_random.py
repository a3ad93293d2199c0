"""Stateless pseudo-random numbers keyed by position: results do not depend on caching, padding or batching.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stateless_uniform(position: Tensor, depth: int, draw: int, key: Tensor | None = None) -> Tensor:
    """A pseudo-random number in [0, 1) for each position.

    Args:
        position: integers of any shape.
        depth: second key, such as a pass or layer.
        draw: third key, such as a step or seed.
        key: fourth key, integers of a shape that broadcasts with `position`, such as token ids; default: `None`, no key.

    Example:
        >>> import torch
        >>> stateless_uniform(torch.tensor([[0, 1, 2]]), depth=1, draw=0).mul(100).long().tolist()
        [[69, 84, 28]]
    """
    x = position.long() * 0x9E3779B1 + (depth * 0x85EBCA77 + draw * 0xC2B2AE3D) % 2**61
    if key is not None:
        x = x + (key.long() + 1) * 0x27D4EB2F165667C5
    return ((_mixed(x) >> 11) & (2**52 - 1)).double() / 2**52


def prefix_hash(
    ids_BT: Tensor, position_BT: Tensor, document_BT: Tensor | None = None, before_B1: Tensor | None = None
) -> Tensor:
    """A hash of each token that depends on all tokens of its document up to and including itself, ``[B, T]``.

    It is the sum of hashes of the tokens, so the hash of the last token before a call is all that the call needs to continue.

    Args:
        ids_BT: the token ids.
        position_BT: the position of each token in its document, ``[B or 1, T]``.
        document_BT: the number of the document of each token, 0 for padding, which adds nothing; default: `None`, each row is
            one document.
        before_B1: the hash of the last token before these; default: `None`, these are the first.

    Example:
        >>> import torch
        >>> ids, positions = torch.tensor([[5, 6, 5], [5, 6, 7]]), torch.arange(3)[None]
        >>> whole = prefix_hash(ids, positions)
        >>> (whole[0] == whole[1]).tolist()
        [True, True, False]
        >>> torch.equal(prefix_hash(ids[:, 2:], positions[:, 2:], before_B1=whole[:, 1:2]), whole[:, 2:])
        True
    """
    own_BT = _mixed(position_BT.long() * 0x9E3779B97F4A7C1 + (ids_BT.long() + 1) * 0x27D4EB2F165667C5)
    if document_BT is not None:
        own_BT = torch.where(document_BT > 0, own_BT, 0)
    sum_BT = own_BT.cumsum(-1)
    if document_BT is not None and bool((document_BT > 1).any()):  # a document does not see the ones before it
        begins_BT = document_BT.diff(prepend=document_BT[:, :1]) != 0
        order_T = torch.arange(sum_BT.shape[1], device=sum_BT.device)
        start_BT = torch.where(begins_BT, order_T, 0).cummax(-1).values
        sum_BT = sum_BT - (sum_BT - own_BT).gather(1, start_BT)
    return sum_BT if before_B1 is None else before_B1 + sum_BT


def _mixed(x: Tensor) -> Tensor:
    # Rounds of multiply and shift mix all bits, so that adjacent positions give unrelated numbers.
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return x

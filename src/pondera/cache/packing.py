"""Packed calls without padding: the selected rows of all sequences run as one long row.

Every matrix product of a packed call gets N rows in one row of length N. Only attention pads them to a batch, so that each
row attends to the rows of its own sequence. An attention function around the backbone's own does this
(`pondera.cache.attention`), so the layers of an architecture need no change.

Shapes: B batch, T tokens, S most rows of any sequence, N rows of all sequences together, K cached and new rows, H heads,
D width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pondera.cache.attention import Attention


@dataclass(frozen=True)
class PackedRows:
    """The sequence of each row of a packed call, and the index of the row in its sequence.

    Args:
        batch_N: the batch index of the sequence; ascending.
        order_N: 0, 1, 2, ... within each sequence.
        batch: B, the number of sequences, including those without rows.
        width: S, the largest number of rows of a sequence.
        even: whether every sequence has `width` rows.

    Example:
        >>> rows = PackedRows.where(torch.tensor([[True, False, True], [False, True, False]]))
        >>> rows.pad(torch.tensor([[[1.0], [2.0], [3.0]]])).squeeze(-1).tolist()
        [[1.0, 2.0], [3.0, 0.0]]
    """

    batch_N: Tensor
    order_N: Tensor
    batch: int
    width: int
    even: bool

    @classmethod
    def where(cls, wanted_BT: Tensor) -> PackedRows:
        """Packs the rows where `wanted_BT` is true, sequence by sequence."""
        count_B = wanted_BT.sum(-1)
        if wanted_BT.shape[0] == 1:
            order_N = torch.arange(int(count_B), device=wanted_BT.device)
            return cls(torch.zeros_like(order_N), order_N, 1, len(order_N), True)
        batch_N, _ = wanted_BT.nonzero(as_tuple=True)
        order_N = (wanted_BT.cumsum(-1) - 1)[wanted_BT]
        fewest, most = (int(number) for number in torch.stack(torch.aminmax(count_B)))
        return cls(batch_N, order_N, wanted_BT.shape[0], most, fewest == most)

    def pad(self, x_1ND: Tensor) -> Tensor:
        """``[1, N, ...]`` -> ``[B, S, ...]``, with zeros after the rows of shorter sequences."""
        if self.even:
            return x_1ND[0].unflatten(0, (self.batch, self.width))
        x_BSD = x_1ND.new_zeros(self.batch, self.width, *x_1ND.shape[2:])
        return x_BSD.index_put((self.batch_N, self.order_N), x_1ND[0])

    def unpad(self, x_BSD: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x_BSD.flatten(0, 1)[None] if self.even else x_BSD[self.batch_N, self.order_N][None]

    def pad_heads(self, x_1HNd: Tensor) -> Tensor:
        """`pad` for tensors with heads: ``[1, H, N, d]`` -> ``[B, H, S, d]``."""
        return x_1HNd if self.batch == 1 else self.pad(x_1HNd.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """The backbone's own attention for packed rows, within each sequence; see `pondera.cache.attention.Server`.

    Args:
        rows: the sequences of the packed rows.
    """

    rows: PackedRows

    def __call__(
        self,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends with queries ``[1, H, N, d]``, and keys and values ``[B, H, K, d]`` of a cache, or packed ones."""
        rows = self.rows
        if key.shape[0] != rows.batch:
            key, value = rows.pad_heads(key), rows.pad_heads(value)
        out_BSHd, _ = base(module, rows.pad_heads(query), key, value, attention_mask, **kwargs)
        return rows.unpad(out_BSHd), None

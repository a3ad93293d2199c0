"""Packed calls: only the rows that are wanted run, whatever batch row they belong to.

Every matrix product of a packed call sees N rows in one sequence of length N; only attention puts them back beside the
other rows of their text. That is done by an attention function around the backbone's own (`pondera.cache.attention`), so no
layer of any architecture has to know.

Shapes: B batch, T tokens, S most rows of any text, N rows of all texts together, K cached and new rows, H heads,
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
    """Which text each row of a packed call belongs to, and which of that text's rows it is.

    Args:
        batch_N: the text; ascending.
        order_N: 0, 1, 2, ... within each text.
        batch: B, texts, with or without rows.
        width: S, the most rows that any text has.
        even: every text has `width` rows.

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
        """The rows at which `wanted_BT` is true, text by text."""
        count_B = wanted_BT.sum(-1)
        if wanted_BT.shape[0] == 1:
            order_N = torch.arange(int(count_B), device=wanted_BT.device)
            return cls(torch.zeros_like(order_N), order_N, 1, len(order_N), True)
        batch_N, _ = wanted_BT.nonzero(as_tuple=True)
        order_N = (wanted_BT.cumsum(-1) - 1)[wanted_BT]
        fewest, most = (int(number) for number in torch.stack(torch.aminmax(count_B)))
        return cls(batch_N, order_N, wanted_BT.shape[0], most, fewest == most)

    def pad(self, x_1ND: Tensor) -> Tensor:
        """``[1, N, ...]`` -> ``[B, S, ...]``, zeros where a text has fewer rows."""
        if self.even:
            return x_1ND[0].unflatten(0, (self.batch, self.width))
        x_BSD = x_1ND.new_zeros(self.batch, self.width, *x_1ND.shape[2:])
        return x_BSD.index_put((self.batch_N, self.order_N), x_1ND[0])

    def unpad(self, x_BSD: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x_BSD.flatten(0, 1)[None] if self.even else x_BSD[self.batch_N, self.order_N][None]

    def pad_heads(self, x_1HNd: Tensor) -> Tensor:
        """``[1, H, N, d]`` -> ``[B, H, S, d]``."""
        return x_1HNd if self.batch == 1 else self.pad(x_1HNd.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """The backbone's own attention over the texts that packed rows belong to; see `pondera.cache.attention.Server`.

    Args:
        rows: where the packed rows belong.
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
        """Attends with ``[1, H, N, d]`` queries, and keys and values ``[B, H, K, d]`` of a cache, or packed as queries are."""
        rows = self.rows
        if key.shape[0] != rows.batch:
            key, value = rows.pad_heads(key), rows.pad_heads(value)
        out_BSHd, _ = base(module, rows.pad_heads(query), key, value, attention_mask, **kwargs)
        return rows.unpad(out_BSHd), None

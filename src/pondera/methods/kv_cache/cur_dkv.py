"""CurDKV: prompt tokens whose keys and values are large among their neighbors are kept.

Shapes: B batch, G KV heads, S slots, D head width, r projected coordinates, W windows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError, unknown
from pondera.methods.kv_cache.common.policy import EvictionPolicy

COMBINE = ("product", "mean", "key", "value")


class CurDKV(EvictionPolicy):
    """Prompt compression by approximate leverage scores of keys and values, as rows are chosen in a CUR decomposition.

    The approximate leverage score of a row is its share of the squared norm of its window of tokens. The scores of key
    and value are multiplied, so a token needs both to be kept: attention weights alone ignore what a value adds.

    Source: Sengupta et al., value-guided KV compression by CUR decomposition (CurDKV), arXiv 2509.15038; its score as in
    kvpress (`CURPress`).
    Cost: two squared norms per slot at the end of prefill; no attention weights are read. Decoding computes no scores, but
    keeps every generated token.
    When not to use it: if a policy that observes attention is affordable, and the prompt ends with the question.
    Resolved: squared norms are leverage scores only of matrices with orthonormal columns; they are what the authors compute,
    and `Compactor` has exact scores. The paper multiplies rows by a random matrix first; kvpress does not, and neither does
    the default here. Windows are counted from the first token, sinks included; the scores of a head are divided by their
    sum, so that `AdaKV` can compare heads. Linear combinations of rows (the U of CUR) are not used: kept rows are unchanged.

    Args:
        budget: KV slots of the prompt per layer and KV head: a number (512), a share of the prompt (0.25) or bytes of a
            sequence ("64MiB"); a list has one per layer, a list of lists one per head.
        window: tokens among which norms are compared; `None`: all.
        combine: ``"product"`` or ``"mean"`` of both scores, or that of ``"key"`` or ``"value"`` alone.
        project: r, columns of the random matrix; `None`: norms of whole rows.
        sinks: number of first tokens that are never evicted.
        seed: seed of the random matrix.

    Example:
        >>> CurDKV(budget=0.25, combine="value").window
        16
    """

    paper: ClassVar[str] = "CurDKV, arXiv 2509.15038"
    cost: ClassVar[str] = "budget KV slots of the prompt and all generated tokens; two norms per slot"
    examples: ClassVar[dict[str, str]] = {
        "exact": "CurDKV(64)",
        "tight": "CurDKV(8, window=4, sinks=1)",
        "exact-heads": "CurDKV([[64, 70], [64, 70], [64, 70]])",
        "tight-heads": "CurDKV([[4, 8], [8, 8], [5, 6]], project=3)",
    }
    prefill_only: bool = True

    def __init__(
        self,
        budget: int | float | str | list = 0.5,
        window: int | None = 16,
        combine: str = "product",
        project: int | None = None,
        sinks: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, sinks, recent=0)
        if combine not in COMBINE:
            raise unknown("combine", combine, COMBINE)
        for name, number in (("window", window), ("project", project)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise UserError(f"{name}={number!r}: give a number, 1 or more, or None")
        self.window, self.combine, self.project, self.seed = window, combine, project, seed

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        number_BGS = layer.number(table).clamp(min=0)
        window_BGS = torch.zeros_like(number_BGS) if self.window is None else number_BGS // self.window
        key_BGS, value_BGS = (
            norm_share(self._projected(rows), window_BGS, table.real) for rows in (table.keys, table.values)
        )
        both = {"product": key_BGS * value_BGS, "mean": (key_BGS + value_BGS) / 2, "key": key_BGS, "value": value_BGS}
        score_BGS = both[self.combine]
        return score_BGS / score_BGS.sum(-1, keepdim=True).clamp(min=torch.finfo(score_BGS.dtype).tiny)

    def _projected(self, rows_BGSD: Tensor) -> Tensor:
        """``[B, G, S, r]``: rows times the random matrix, or the rows themselves."""
        rows_BGSD = rows_BGSD.to(torch.promote_types(rows_BGSD.dtype, torch.float32))
        if self.project is None:
            return rows_BGSD
        draw = torch.Generator().manual_seed(self.seed)
        matrix_Dr = torch.randn(rows_BGSD.shape[-1], self.project, generator=draw) / self.project**0.5
        return rows_BGSD @ matrix_Dr.to(rows_BGSD)


def norm_share(rows_BGSD: Tensor, window_BGS: Tensor, there_BGS: Tensor) -> Tensor:
    """``[B, G, S]``: the share of each row in the squared norm of its window; 0 for rows that are not there.

    Args:
        rows_BGSD: keys or values.
        window_BGS: the index of the window of each row.
        there_BGS: which rows count.

    Example:
        >>> rows = torch.tensor([[1.0], [3.0], [5.0]])
        >>> norm_share(rows[None, None], torch.tensor([[[0, 0, 1]]]), torch.ones(1, 1, 3, dtype=torch.bool))[0, 0].tolist()
        [0.10000000149011612, 0.8999999761581421, 1.0]
    """
    square_BGS = rows_BGSD.square().sum(-1).masked_fill(~there_BGS, 0)
    index_BGS = window_BGS.long()
    total_BGW = square_BGS.new_zeros(*square_BGS.shape[:2], int(index_BGS.max()) + 1).scatter_add_(
        2, index_BGS, square_BGS
    )
    return square_BGS / total_BGW.gather(2, index_BGS).clamp(min=torch.finfo(square_BGS.dtype).tiny)

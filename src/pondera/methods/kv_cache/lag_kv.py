"""LagKV: keys and values that stand out against those of the tokens after them are kept.

Shapes: B batch, G KV heads, S slots, D head width, P partitions, L tokens of a partition, N = P * L.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import EvictionPolicy


class LagKV(EvictionPolicy):
    """Keeps the tokens of each partition whose keys and values differ most from the range of the next partition.

    After the sinks, tokens form partitions of `lag` tokens. Once the next partition is complete, its minimum and maximum
    of every channel normalize the keys and the values of a partition. The standard deviation of a token over its
    normalized channels, with a softmax over its partition, is its score; the scores of key and value are added. The rank
    within the partition decides, so all partitions keep about the same number of tokens. The last complete partition and
    the tokens after it always stay.

    Source: Liang et al., LagKV, arXiv 2504.04704, and the authors' code.
    Cost: minimum, maximum and standard deviation of keys and values, once per partition; one float per KV slot; no
    attention weights are read.
    When not to use it: if a policy that observes attention is affordable, and the prompt ends with the question. For
    budgets near ``sinks + 2 * lag``, which leave nothing to choose.
    Resolved: the paper keeps a fixed share of each partition; here the budget says how many tokens stay in total, and the
    ranks of all partitions compete for it; among equal ranks the newer token wins. A token is scored once, against tokens
    none of which has been evicted, so scores do not depend on how the prompt is divided into calls. A channel that is
    constant in the next partition is left out. Keys are compared after rotary embedding, as in the authors' code.

    Args:
        budget: KV slots per layer and KV head: a number (512), a share of the tokens seen (0.25) or bytes of a sequence
            ("64MiB"); a list has one per layer, a list of lists one per head; at least ``sinks + 2 * lag - 1``.
        lag: L, tokens of a partition, 2 or more.
        sinks: number of first tokens that are never evicted.

    Example:
        >>> LagKV(512, lag=128).budget.least  # 16 sinks, a partition, and fewer tokens than another one
        271
    """

    paper: ClassVar[str] = "LagKV, arXiv 2504.04704"
    cost: ClassVar[str] = "budget KV slots and one float each; a range and a deviation of keys and values per partition"
    examples: ClassVar[dict[str, str]] = {
        "exact": "LagKV(64, lag=4)",
        "tight": "LagKV(8, lag=3, sinks=1)",
        "exact-share": "LagKV(1.0, lag=4)",
        "tight-share": "LagKV(0.5, lag=2, sinks=1)",
        "exact-heads": "LagKV([[64, 70], [64, 70], [64, 70]], lag=4, sinks=4)",
        "tight-heads": "LagKV([[6, 8], [8, 8], [7, 6]], lag=3, sinks=1)",
    }

    def __init__(self, budget: int | float | str | list = 0.5, lag: int = 128, sinks: int = 16) -> None:
        if isinstance(lag, bool) or not isinstance(lag, int) or lag < 2:
            raise UserError(f"lag={lag!r}: give the number of tokens of a partition, 2 or more")
        always = 2 * lag - 1 + (sinks if isinstance(sinks, int) else 0)  # the base class refuses other sinks
        super().__init__(budget, sinks, recent=0, least=always)
        self.lag = lag

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: the rank within the partition, ``inf`` until it is known."""
        return {"rank": torch.inf}

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`; ranks the partitions that have become complete since the last eviction."""
        rank_BGS = table.note["rank"]
        waiting_BGS = rank_BGS.isinf() & table.real
        if bool((waiting_BGS.sum(-1) >= self.sinks + 2 * self.lag).any()):
            self._rank(table, waiting_BGS)
        return rank_BGS

    def _rank(self, table: KVStore, waiting_BGS: Tensor) -> None:
        """Notes the ranks of all partitions with a complete next one."""
        last = torch.iinfo(table.position.dtype).max
        order_BGS = table.position.masked_fill(~waiting_BGS, last).argsort(dim=-1)[:, :, self.sinks :]
        whole_BG = (waiting_BGS.sum(-1) - self.sinks).clamp(min=0) // self.lag
        slot_BGN = order_BGS[:, :, : int(whole_BG.max()) * self.lag]
        score_BGPL = sum(
            lag_score(rows.gather(2, slot_BGN[..., None].expand(-1, -1, -1, rows.shape[-1])), self.lag)
            for rows in (table.keys, table.values)
        )
        assert isinstance(score_BGPL, Tensor)
        rank_BGPL = score_BGPL.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag
        ranked_BGP = torch.arange(rank_BGPL.shape[2], device=whole_BG.device) < whole_BG[..., None] - 1
        rank_BGN = rank_BGPL.masked_fill(~ranked_BGP[..., None], torch.inf).flatten(2)
        table.note["rank"].scatter_(2, slot_BGN[:, :, : -self.lag], rank_BGN.to(table.note["rank"].dtype))


def lag_score(rows_BGND: Tensor, lag: int) -> Tensor:
    """``[B, G, P - 1, L]``: the scores of the tokens of each partition but the last, by the range of the next partition.

    Args:
        rows_BGND: keys or values of P partitions, in the order of the sequence.
        lag: L, tokens of a partition.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 0.0], [1.0, 1.0]])  # two partitions of two tokens
        >>> lag_score(rows[None, None], lag=2).argmax().item()  # (0, 3) leaves the range from (0, 0) to (1, 1)
        1
    """
    rows_BGPLD = rows_BGND.to(torch.promote_types(rows_BGND.dtype, torch.float32)).unflatten(2, (-1, lag))
    scored, reference = rows_BGPLD[:, :, :-1], rows_BGPLD[:, :, 1:]
    least, most = torch.aminmax(reference, dim=3, keepdim=True)
    varies_BGP1D = most > least
    there = varies_BGP1D.to(scored.dtype)
    normal = torch.where(varies_BGP1D, (scored - least) / (most - least).masked_fill(~varies_BGP1D, 1), 0)
    count = there.sum(-1).clamp(min=2)
    mean = normal.sum(-1) / count
    variance = ((normal - mean[..., None]).square() * there).sum(-1) / (count - 1)
    return variance.sqrt().softmax(-1)

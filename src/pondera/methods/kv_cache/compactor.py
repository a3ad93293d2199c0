"""Compactor: keys that few others can stand for, and keys that their neighborhood attends to, are kept.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, D head width, C queries and keys of a chunk,
k sketched coordinates.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.policy import ALL, EvictionPolicy
from pondera.methods.kv_cache.common.pooling import pooled
from pondera.methods.kv_cache.common.query_rotation import QueryRotation

RIDGE = 0.01
"""Added to the eigenvalues of the keys' Gram matrix, as in the authors' code."""
KERNEL = 3
"""Pooling width of attention in tokens, as in the authors' code."""


class Compactor(EvictionPolicy):
    """Question-agnostic prompt compression by leverage scores of keys and by attention that is not causal.

    The leverage score of a key is x' (X' X)^-1 x, with the centered keys before rotary embedding as rows of X: near 1 if no
    other keys span its direction, near 0 if many do. A random matrix with `sketch` columns makes them narrower first. The
    attention score is what all queries of a chunk of the prompt, earlier and later ones, pay to a key of the same chunk,
    times the norm of the value. Both scores are normalized to mean 0 and deviation 1, and the score of a slot is
    attention + `blending` * leverage.

    Source: Chari and Van Durme, Compactor, arXiv 2507.08143, and the authors' code.
    Cost: at the end of prefill about 2 * chunk * D operations per token and query head for attention, and a Gram matrix of
    keys; one float per KV slot. Decoding computes no scores, but keeps every generated token.
    When not to use it: on models without rotary positions, which it refuses. For one question that the prompt ends with
    (`SnapKV`). For long outputs after short prompts.
    Resolved: as in the authors' press in kvpress, dot products in chunks are not scaled, attention is averaged over the query
    heads of a KV head and then over three neighboring tokens, both scores are normalized over all heads and tokens of a
    sequence, and first and last tokens enter no score. (Their engine computes leverage within 512 tokens, and attention
    without values and neighbors.) They set `blending` to the share of evicted tokens, to 0.35, or to 0.5. They count the
    missing queries of a short last chunk as uniform attention; here it has fewer queries, for fewer keys. Left out: the
    calibration that chooses the budget by the context. In chunked prefill the method evicts at the end of each call; a query
    then attends to the tokens of its chunk that are still there.

    Args:
        budget: KV slots of the prompt per layer and KV head: a number (512), a share of the prompt (0.25) or bytes of a
            sequence ("64MiB"); a list has one per layer.
        blending: weight of the leverage score.
        chunk: C, tokens of the prompt that attend to each other.
        sketch: k, columns of the random matrix; exact leverage scores if heads are not wider; `None`: always exact.
        sinks: number of first tokens that are never evicted.
        recent: number of latest tokens that are never evicted.
        seed: seed of the random matrix.

    Example:
        >>> Compactor(budget=0.5, sketch=None).blending
        0.35
    """

    paper: ClassVar[str] = "Compactor, arXiv 2507.08143"
    cost: ClassVar[str] = (
        "budget KV slots of the prompt and all generated tokens; attention within chunks, and a Gram matrix of keys"
    )
    examples: ClassVar[dict[str, str]] = {
        "exact": "Compactor(64)",
        "tight": "Compactor(8, chunk=4, sketch=None, sinks=1, recent=1)",
    }
    prefill_only: bool = True
    signed: ClassVar[bool] = True
    observation_window: int = ALL
    observes_scores: bool = False

    def __init__(
        self,
        budget: int | float | str | list = 0.5,
        blending: float = 0.35,
        chunk: int = 256,
        sketch: int | None = 48,
        sinks: int = 8,
        recent: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(budget, sinks, recent)
        if self.by_head:
            raise UserError(
                "Compactor normalizes scores over all heads of a layer, so they cannot have budgets of their own: give one "
                "budget per layer, or AdaKV(Compactor(0.5))"
            )
        if not isinstance(recent, int):
            raise UserError(f"recent={recent!r}: give a number of tokens, 0 or more")
        if not 0 <= blending < float("inf"):
            raise UserError(f"blending={blending}: give a weight of 0 or more")
        for name, number in (("chunk", chunk), ("sketch", 1 if sketch is None else sketch)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise UserError(f"{name}={number!r}: give a number, 1 or more")
        self.blending, self.chunk, self.sketch, self.seed = blending, chunk, sketch, seed
        self.rotation: QueryRotation | None = None

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: attention received from the queries of the same chunk."""
        return {"received": 0.0}

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        self.rotation = QueryRotation.of(model, type(self).__name__, self.rotation)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        raise UserError(
            f"{type(self).__name__} rotates keys back by the numbers of their tokens, and a think method keeps several "
            "slots per token; use SnapKV(1024)"
        )

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """See `Policy.observe`: adds the attention of these queries within their chunks."""
        padding_B, first = layer.state["padding"], int(seen.number_T[0])
        begin_B, end = padding_B + self.sinks, layer.seen - self.recent
        lowest = max(0, (first - int(begin_B.max())) // self.chunk)
        highest = (int(seen.number_T[-1]) - int(begin_B.min())) // self.chunk
        position_BGS, order_BGS = table.position.sort(dim=-1)
        place_C = torch.arange(self.chunk, device=begin_B.device)
        for number in range(lowest, highest + 1):
            number_BC = begin_B[:, None] + number * self.chunk + place_C
            at_BC = number_BC - first
            asks_BC = (at_BC >= 0) & (at_BC < len(seen.number_T)) & (number_BC < end)
            at_BC = at_BC.clamp(0, len(seen.number_T) - 1)
            asks_BC &= seen.real_BT.gather(1, at_BC)
            index = at_BC[:, None, None, :, None].expand(*seen.query_BGRTD.shape[:3], -1, seen.query_BGRTD.shape[-1])
            at_BGC = (position_BGS < number_BC[:, None, :1]).sum(-1, keepdim=True) + place_C
            there_BGC = at_BGC < table.used
            at_BGC = at_BGC.clamp(max=table.used - 1)
            there_BGC &= position_BGS.gather(2, at_BGC) < (number_BC[:, -1:, None] + 1).clamp(max=end)
            slot_BGC = order_BGS.gather(2, at_BGC)
            keys_BGCD = table.keys.gather(2, slot_BGC[..., None].expand(-1, -1, -1, table.keys.shape[-1]))
            received_BGC = attention_of_all(seen.query_BGRTD.gather(3, index), keys_BGCD, asks_BC, there_BGC)
            table.note["received"].scatter_add_(2, slot_BGC, received_BGC.to(table.note["received"].dtype))

    def score(self, layer: KVStoreLayer, table: KVStore) -> Tensor:
        """See `EvictionPolicy.score`."""
        parts = [self._parts(layer, each) for each in layer.tables]
        scored_BN = torch.cat([scored_BGS.flatten(1) for *_, scored_BGS in parts], 1)
        *mine, scored_BGS = parts[layer.tables.index(table)]
        total_BGS = torch.zeros_like(mine[0])
        for which, weight in ((0, 1.0), (1, self.blending)):
            mean_B, deviation_B = moments(torch.cat([part[which].flatten(1) for part in parts], 1), scored_BN)
            total_BGS += weight * (mine[which] - mean_B[:, None, None]) / deviation_B.clamp(min=1e-6)[:, None, None]
        return total_BGS.masked_fill(~scored_BGS, 0)

    def _parts(self, layer: KVStoreLayer, table: KVStore) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, G, S]`` each: attention and leverage before normalization, and which slots have them."""
        assert self.rotation is not None
        number_BGS = layer.number(table)
        scored_BGS = table.real & (number_BGS >= self.sinks) & (table.position < layer.seen - self.recent)
        wide = torch.promote_types(table.keys.dtype, torch.float32)
        attention_BGS = table.note["received"] * table.values.to(wide).norm(dim=-1)
        attention_BGS = pooled(attention_BGS.masked_fill(~scored_BGS, 0), table.position, KERNEL, "mean")
        keys_BGSD = self.rotation.move(table.keys.to(wide), -number_BGS).to(wide)
        D = keys_BGSD.shape[-1]
        if self.sketch is not None and self.sketch < D:
            draw = torch.Generator().manual_seed(self.seed)
            sketch_Dk = torch.randn(D, self.sketch, generator=draw) / self.sketch**0.5
            keys_BGSD = keys_BGSD @ sketch_Dk.to(keys_BGSD)
        return attention_BGS, leverage_scores(keys_BGSD, scored_BGS), scored_BGS


def leverage_scores(rows_BGSD: Tensor, there_BGS: Tensor, ridge: float = RIDGE) -> Tensor:
    """``[B, G, S]``: x' (X' X + ridge)^-1 x for each centered row x of X, from 0 to 1; 0 for rows that are not there.

    Args:
        rows_BGSD: keys.
        there_BGS: the rows of X.
        ridge: added to the diagonal.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> leverage_scores(rows[None, None], torch.ones(1, 1, 4, dtype=torch.bool)).mul(100).round().tolist()
        [[[75.0, 8.0, 8.0, 8.0]]]
    """
    there_BGS1 = there_BGS[..., None]
    rows_BGSD = rows_BGSD.masked_fill(~there_BGS1, 0)
    mean_BG1D = rows_BGSD.sum(2, keepdim=True) / there_BGS1.sum(2, keepdim=True).clamp(min=1)
    rows_BGSD = (rows_BGSD - mean_BG1D).masked_fill(~there_BGS1, 0)
    gram_BGDD = rows_BGSD.mT @ rows_BGSD + ridge * torch.eye(rows_BGSD.shape[-1]).to(rows_BGSD)
    lower_BGDD, _ = torch.linalg.cholesky_ex(gram_BGDD)
    return torch.linalg.solve_triangular(lower_BGDD, rows_BGSD.mT, upper=False).square().sum(2)


def attention_of_all(query_BGRCD: Tensor, key_BGCD: Tensor, asks_BC: Tensor, there_BGC: Tensor) -> Tensor:
    """``[B, G, C]``: the attention that each key receives from all queries, averaged over query heads; nothing is masked.

    Args:
        query_BGRCD: queries after rotary embedding.
        key_BGCD: keys after rotary embedding.
        asks_BC: false for entries that are not a query.
        there_BGC: false for entries that are not a key.
    """
    wide = torch.promote_types(key_BGCD.dtype, torch.float32)
    score_BGRCK = query_BGRCD.to(wide) @ key_BGCD.to(wide).mT[:, :, None]
    weight_BGRCK = score_BGRCK.masked_fill(~there_BGC[:, :, None, None], -torch.inf).softmax(-1)
    asks_B11C1 = asks_BC[:, None, None, :, None]
    return torch.where(asks_B11C1 & there_BGC[:, :, None, None], weight_BGRCK, 0).mean(2).sum(2)


def moments(x_BN: Tensor, there_BN: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` each: mean and standard deviation of the numbers of a row that are there."""
    count_B = there_BN.sum(-1)
    mean_B = x_BN.masked_fill(~there_BN, 0).sum(-1) / count_B.clamp(min=1)
    square_B = (x_BN - mean_B[:, None]).square().masked_fill(~there_BN, 0).sum(-1)
    return mean_B, (square_B / (count_B - 1).clamp(min=1)).sqrt()

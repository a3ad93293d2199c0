"""TokenSelect: sparse attention to the tokens that all heads of a layer vote for.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.native_attention import scores_natively
from pondera.cache.native_evict import received_natively
from pondera.cache.native_select import select_natively
from pondera.cache.slot_attention import scores
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import Policy


class TokenSelect(Policy):
    """Sparse attention to the first tokens, the latest ones and those that all heads of a layer vote for.

    The method keeps all tokens. Each query head distributes one vote over the remaining tokens by a softmax of its
    attention scores. All heads attend to the tokens with the most votes. As long as the query stays similar, the layer
    reuses its last selection.

    Source: Wu et al., TokenSelect, arXiv 2411.02886.
    Cost: all KV slots stay. A selection computes the product of one query per head with all keys; attention then reads
    ``sinks + chosen + recent`` slots. Except in float32 on a CPU, the method copies the selected keys and values, so a
    step is cheaper only for long contexts.
    When not to use it: to save memory.
    Resolved: a call of several tokens votes with the mean of its queries and always attends to its own tokens, so
    prefill in one call is dense; use chunked prefill for long prompts. The method scales scores as the model does (the
    authors' kernel does not scale them), query heads belong to consecutive KV heads as in the model, and queries keep
    their positions. The layer reuses a selection if the cosine of its concatenated queries is at least `reuse`; it then
    ignores tokens that became candidates since that selection. While tokens may be rolled back, every call selects
    again.

    Args:
        chosen: number of selected tokens.
        sinks: number of first tokens that are always attended to.
        recent: number of latest tokens before the call that are always attended to.
        reuse: cosine from which the layer reuses its last selection; above 1: never.

    Example:
        >>> TokenSelect(chosen=1024).recent
        512
    """

    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"
    cost: ClassVar[str] = "one KV slot per token; attention over sinks + chosen + recent of them"
    examples: ClassVar[dict[str, str]] = {
        "exact": "TokenSelect(64, sinks=1, recent=2)",
        "tight": "TokenSelect(3, sinks=1, recent=2, reuse=0.5)",
    }
    saves: ClassVar[str] = "reading"
    sparse_attention: bool = True

    def __init__(self, chosen: int = 2048, sinks: int = 128, recent: int = 512, reuse: float = 0.9) -> None:
        super().__init__()
        if chosen < 1 or sinks < 0 or recent < 0:
            raise UserError(
                f"chosen={chosen}, sinks={sinks}, recent={recent}: give chosen 1 or more, sinks and recent 0 or more"
            )
        self.chosen, self.sinks, self.recent, self.reuse = chosen, sinks, recent, reuse

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: 1 for the slots of the last selection."""
        return {"chosen": 0.0}

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """See `Policy.select_kv`."""
        if table.used - self.sinks - self.recent <= self.chosen:  # also with padding, which only makes fewer selectable
            return None
        found = self._natively(layer, table, query_BGRTD, call)
        if found is not None:
            return None if found[0] is None else found[0][:, None].expand(-1, len(table.heads), -1)
        # The method evicts nothing, so the slots of all heads are those of the same tokens.
        position_BS = table.position[:, 0]
        real_BS = position_BS >= 0
        always_BS = position_BS - layer.state["padding"][:, None] < self.sinks
        always_BS |= position_BS >= call.start - self.recent
        free_BS = real_BS & ~always_BS
        many_B = free_BS.sum(-1) > self.chosen
        if not bool(many_B.any()):
            return None
        query_BGRD = _mean_query(query_BGRTD, call)
        again_B = self._alike(layer, query_BGRD) & many_B
        vote_BS = vote(query_BGRD, table.keys, free_BS, call.scaling) if not bool(again_B.all()) else None
        if vote_BS is None:
            choice_BS = table.note["chosen"][:, 0] > 0
        else:
            best_Bc = vote_BS.masked_fill(~free_BS, -torch.inf).topk(self.chosen, dim=-1, sorted=False).indices
            choice_BS = torch.zeros_like(free_BS).scatter(1, best_Bc, True)
            choice_BS = torch.where(again_B[:, None], table.note["chosen"][:, 0] > 0, choice_BS)
            if not layer.record_past:
                self._remember(layer, table, query_BGRD, choice_BS, many_B & ~again_B)
        return _listed(real_BS & (always_BS | choice_BS))[:, None].expand(-1, len(table.heads), -1)

    def _natively(
        self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall
    ) -> tuple[Tensor | None] | None:
        """The selection of one token with a native kernel, see `select_natively`."""
        if call.tokens > 1 or call.mask_B1TK is not None:
            return None
        if "query" not in layer.state:
            layer.state["query"] = torch.zeros_like(query_BGRTD[:, :, :, 0], memory_format=torch.contiguous_format)
        return select_natively(
            *(query_BGRTD, table.keys, table.position, layer.state["query"], table.note["chosen"]),
            [padding + self.sinks for padding in layer.state["padding"].tolist()],
            call.start - self.recent,
            self.chosen,
            self.reuse,
            call.start,
            call.scaling,
            not layer.record_past,
        )

    def _alike(self, layer: KVStoreLayer, query_BGRD: Tensor) -> Tensor:
        """``[B]``: whether the query is similar to that of the last selection."""
        if "query" not in layer.state:
            layer.state["query"] = torch.zeros_like(query_BGRD)
        last_BGRD = layer.state["query"]
        cosine_B = F.cosine_similarity(query_BGRD.flatten(1), last_BGRD.flatten(1), dim=-1)
        return (cosine_B >= self.reuse) & (last_BGRD != 0).flatten(1).any(-1)

    def _remember(
        self, layer: KVStoreLayer, table: KVStore, query_BGRD: Tensor, choice_BS: Tensor, rows_B: Tensor
    ) -> None:
        """Stores a selection and its query, for these batch rows."""
        layer.state["query"] = torch.where(rows_B[:, None, None, None], query_BGRD, layer.state["query"])
        note_BGS = table.note["chosen"]
        note_BGS.copy_(torch.where(rows_B[:, None, None], choice_BS[:, None].to(note_BGS.dtype), note_BGS))


def vote(query_BGRD: Tensor, keys_BGSD: Tensor, free_BS: Tensor, scaling: float) -> Tensor:
    """``[B, S]``: the sum of the votes of all query heads over the selectable slots; each head has one vote."""
    B, G, S = keys_BGSD.shape[:3]
    position_BGS = torch.where(free_BS, 0, -1).to(torch.int32)[:, None].expand(B, G, S).contiguous()
    score_BGR1S = scores_natively(query_BGRD, keys_BGSD, position_BGS, 0, scaling)
    votes_BGS = None if score_BGR1S is None else received_natively(score_BGR1S)
    if votes_BGS is None:
        score_BGR1S = scores(query_BGRD[:, :, :, None], keys_BGSD, free_BS[:, None, None], scaling)
        # In a batch row without selectable slots the softmax is NaN, and the caller selects nothing.
        weight_BGR1S = score_BGR1S.softmax(-1, dtype=torch.promote_types(score_BGR1S.dtype, torch.float32))
        votes_BGS = weight_BGR1S.sum((2, 3))
    return votes_BGS.sum(1)


def _listed(wanted_BS: Tensor) -> Tensor:
    """``[B, k]``: the slots where `wanted_BS` is true, in order; a row with fewer of them ends with -1."""
    count_B = wanted_BS.sum(-1)
    most, fewest = int(count_B.amax()), int(count_B.amin())
    if most == fewest:
        return wanted_BS.nonzero()[:, 1].view(-1, most)
    wanted_Bk, slot_Bk = torch.sort(wanted_BS.to(torch.uint8), dim=-1, descending=True, stable=True)
    return torch.where(wanted_Bk > 0, slot_Bk, -1)[:, :most]


def _mean_query(query_BGRTD: Tensor, call: AttentionCall) -> Tensor:
    """``[B, G, R, D]``: the mean of all queries except padding."""
    if call.tokens == 1 and call.mask_B1TK is None:
        return query_BGRTD[:, :, :, 0]
    real_BT = (call.position_BT >= 0).to(query_BGRTD.dtype)
    share_BT = real_BT / real_BT.sum(-1, keepdim=True).clamp(min=1)
    return (query_BGRTD * share_BT[:, None, None, :, None]).sum(3)

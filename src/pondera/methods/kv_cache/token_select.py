"""TokenSelect: all heads vote on which tokens to attend to.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import scores
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.policy import Policy


class TokenSelect(Policy):
    """Keeps everything, and attends to the first tokens, the latest, and those that the heads of a layer vote for.

    Each query head spreads one vote over the tokens between, by softmax of the products; the tokens with most votes are
    attended to by all heads. While the query stays alike, the last choice is used again.

    Source: Wu et al., TokenSelect, arXiv 2411.02886.
    Cost: all rows stay. A choice takes the product of one query per head with all keys; attention then takes
    ``sinks + chosen + recent`` rows. The rows chosen are copied out, so on CPUs a step is cheaper only for long contexts.
    When not to use it: to save memory.
    Resolved: a call of several tokens votes with the mean of its queries, and always sees its own tokens, so a prompt in one
    call is not thinned at all; give a long one in pieces. Products are scaled as in the model (the authors' kernel does not
    scale them), query heads belong to consecutive KV heads as in the model, and queries are not rotated to another place. A
    choice is used again where the cosine of all heads' queries taken together is at least `reuse`; tokens that came up for
    choice since then are not attended to. While tokens may be drafts, every call chooses anew.

    Args:
        chosen: tokens that are voted for.
        sinks: first tokens that are always attended to.
        recent: latest tokens that are, beside those of the call.
        reuse: cosine from which the last choice is used again; above 1: never.

    Example:
        >>> TokenSelect(chosen=1024).recent
        512
    """

    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"
    cost: ClassVar[str] = "one row per token; attention over sinks + chosen + recent of them"
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
                f"chosen={chosen}, sinks={sinks}, recent={recent}: give 1 token or more to choose, and 0 or more of the others"
            )
        self.chosen, self.sinks, self.recent, self.reuse = chosen, sinks, recent, reuse

    @property
    def note_defaults(self) -> dict[str, float]:
        """See `Policy.note_defaults`: 1 where the last choice fell."""
        return {"chosen": 0.0}

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """See `Policy.select_kv`."""
        number_BGS = layer.number(table)
        always_BGS = (number_BGS < self.sinks) | (table.position >= call.start - self.recent)
        free_BGS = table.real & ~always_BGS
        many_B = free_BGS[:, 0].sum(-1) > self.chosen
        if not bool(many_B.any()):
            return None
        query_BGRD = _mean_query(query_BGRTD, call)
        again_B = self._alike(layer, query_BGRD) & many_B
        vote_BS = vote(query_BGRD, table.keys, free_BGS, call.scaling) if not bool(again_B.all()) else None
        if vote_BS is None:
            choice_BS = table.note("chosen")[:, 0] > 0
        else:
            best_Bc = vote_BS.masked_fill(~free_BGS[:, 0], -torch.inf).topk(self.chosen, dim=-1).indices
            choice_BS = torch.zeros_like(free_BGS[:, 0]).scatter(1, best_Bc, True)
            choice_BS = torch.where(again_B[:, None], table.note("chosen")[:, 0] > 0, choice_BS)
            if not layer.record_past:
                self._remember(layer, table, query_BGRD, choice_BS, many_B & ~again_B)
        wanted_BGS = table.real & (always_BGS | choice_BS[:, None])
        most = int(wanted_BGS.sum(-1).amax())
        found_BGk, slot_BGk = wanted_BGS.to(torch.uint8).topk(most, dim=-1)
        return torch.where(found_BGk > 0, slot_BGk, -1)

    def _alike(self, layer: KVStoreLayer, query_BGRD: Tensor) -> Tensor:
        """``[B]``: the query is like that of the last choice."""
        if "query" not in layer.state:
            layer.state["query"] = torch.zeros_like(query_BGRD)
        last_BGRD = layer.state["query"]
        cosine_B = F.cosine_similarity(query_BGRD.flatten(1), last_BGRD.flatten(1), dim=-1)
        return (cosine_B >= self.reuse) & (last_BGRD != 0).flatten(1).any(-1)

    def _remember(
        self, layer: KVStoreLayer, table: KVStore, query_BGRD: Tensor, choice_BS: Tensor, rows_B: Tensor
    ) -> None:
        """Keeps a choice, and the query that it was made for, in these rows."""
        layer.state["query"] = torch.where(rows_B[:, None, None, None], query_BGRD, layer.state["query"])
        note_BGS = table.note("chosen")
        note_BGS.copy_(torch.where(rows_B[:, None, None], choice_BS[:, None].to(note_BGS.dtype), note_BGS))


def vote(query_BGRD: Tensor, keys_BGSD: Tensor, free_BGS: Tensor, scaling: float) -> Tensor:
    """``[B, S]``: the votes of all query heads, one each, over the slots that are free to be chosen."""
    score_BGR1S = scores(query_BGRD[:, :, :, None], keys_BGSD, free_BGS[:, :, None], scaling)
    # In a row without free slots the softmax is NaN, and nothing is chosen.
    return score_BGR1S.softmax(-1, dtype=torch.promote_types(score_BGR1S.dtype, torch.float32)).sum((1, 2, 3))


def _mean_query(query_BGRTD: Tensor, call: AttentionCall) -> Tensor:
    """``[B, G, R, D]``: over the queries that are no padding."""
    real_BT = (call.position_BT >= 0).to(query_BGRTD.dtype)
    share_BT = real_BT / real_BT.sum(-1, keepdim=True).clamp(min=1)
    return (query_BGRTD * share_BT[:, None, None, :, None]).sum(3)

"""SentenceKV: sparse attention to the sentences of the context that resemble the current one.

Shapes: B batch, G KV heads, R query heads per KV head, T queries, S slots, K tokens seen, N sentences, D head width.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import KVStore
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedModel
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.marked_tokens import MARKED, mark_tokens, marked, roll_back_marks
from pondera.methods.kv_cache.common.policy import Policy, highest
from pondera.methods.kv_cache.common.wrapper import PolicyWrapper
from pondera.methods.kv_cache.snap_kv import SnapKV

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOSED, EVICTED = "closed", "evicted"
"""Names in `KVStoreLayer.state`: the number of complete sentences, and `evicted_until`, when the means were computed."""
END = re.compile(r"""[^\w\s]*[.!?。！？…]["'”’)\]]*\s*|\s*\n\s*\n\s*""")
"""The text of a token that ends a sentence: punctuation with nothing but quotes and spaces after it, or an empty line."""


class SentenceKV(PolicyWrapper):
    """Sparse attention to whole sentences: those whose mean key has the highest product with the queries of the current one.

    A policy compresses the prompt. The remaining tokens belong to sentences, and each KV head of a layer stores the mean
    key of every complete sentence. A decoding step compares the mean of the queries of the current sentence with these means,
    and attends to the tokens of the best sentences, up to a number of tokens, in addition to the first and latest tokens.

    Source: Zhu et al., SentenceKV, arXiv 2504.00970.
    Cost: the KV slots that the policy keeps, the mean keys of their sentences and up to `longest` queries per layer. A step
    reads the means and the selected slots; when a sentence ends, all keys are read once.
    When not to use it: for code and tables, which have no sentences; where single tokens matter, such as numbers in a text,
    which `TokenSelect` finds better, by a product with every key; to save memory beyond what the policy saves.
    Resolved: the authors store the keys of query heads; here the query heads of a KV head share a selection, by the sum of
    their products. As in the authors' code, keys and queries have their positions, products are not scaled, and a step
    attends to all slots where the current sentence has no more than `dense` tokens, or ends with it. The unfinished
    sentence, which the authors attend to only as far as it is recent, is always attended to, within `longest` tokens, and
    may exceed `attended`. Of the last sentence that fits only partly, the latest tokens are taken. A call of several
    tokens, such as a question, selects once with the mean of its queries, and attends to its own tokens in addition; the
    first call attends to everything. The authors keep the slots on the CPU and load the selected ones; here all
    stay where they are.

    Args:
        policy: compresses the prompt; default: `None`, ``SnapKV(640)``, five times `attended`.
        attended: number of slots that a step attends to, per layer and KV head.
        ends: the ids of tokens that end a sentence, such as those of ``SentenceKV.ends_of(tokenizer)``; needed.
        sinks: number of first tokens that are always attended to.
        recent: number of latest tokens that are always attended to.
        dense: in the first tokens of a sentence, up to this number, a step attends to all slots.
        longest: a sentence of more tokens is cut.

    Example:
        >>> SentenceKV(SnapKV(1280), attended=256, ends=[30, 47]).recent
        32
    """

    paper: ClassVar[str] = "SentenceKV, arXiv 2504.00970"
    cost: ClassVar[str] = "the policy's KV slots and a mean key per sentence; attention over `attended` slots"
    examples: ClassVar[dict[str, str]] = {
        "exact": "SentenceKV(SnapKV(64, window=4), attended=64, ends=[3, 5], sinks=1, recent=2)",
        "tight": "SentenceKV(SnapKV(8, window=3, kernel=3), attended=64, ends=[3, 5], sinks=1, recent=2)",
        "exact-sparse": "SentenceKV(StreamingLLM(64), attended=64, ends=[3, 5], sinks=1, recent=2)",
        "tight-sparse": "SentenceKV(PreallocatedCache(), attended=8, ends=[5, 20, 40, 60, 80], sinks=1, recent=2, longest=4)",
    }
    sparse_attention: bool = True

    def __init__(
        self,
        policy: KVCacheMethod | None = None,
        attended: int = 128,
        ends: list[int] | None = None,
        sinks: int = 32,
        recent: int = 32,
        dense: int = 1,
        longest: int = 64,
    ) -> None:
        policy = SnapKV(640) if policy is None else policy
        if not isinstance(policy, Policy) or policy.sparse_attention or policy.second_run is not None:
            raise UserError(
                f"policy={type(policy).__name__}(...): give an eviction policy that does not read the prompt twice, "
                "e.g. SentenceKV(SnapKV(640), ends=...), or PreallocatedCache()"
            )
        if not ends or not all(type(token) is int and token >= 0 for token in ends):
            raise UserError(
                f"ends={ends!r}: give the ids of tokens that end a sentence; in Python, ends=SentenceKV.ends_of(tokenizer)"
            )
        if sinks < 0 or recent < 0 or dense < 0 or longest < 1 or attended <= sinks + recent:
            raise UserError(
                f"attended={attended}, sinks={sinks}, recent={recent}, dense={dense}, longest={longest}: give longest 1 or "
                "more, the others 0 or more, and attended more than sinks and recent together"
            )
        super().__init__(policy)
        self.sparse_attention = True
        if policy.saves == "nothing":
            setattr(self, "saves", "reading")  # noqa: B010 (of other methods it is known to the class)
        self.attended, self.marks, self.sinks, self.recent = attended, list(ends), sinks, recent
        self.dense, self.longest = dense, longest

    @staticmethod
    def ends_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids of all tokens that end a sentence: punctuation such as ``.``, ``?"`` or ``。``, and empty lines."""
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return [token for token, text in enumerate(texts) if END.fullmatch(text)]

    def prepare(self, model: PreTrainedModel, cache: KVCache) -> None:
        """See `KVCacheMethod.prepare`."""
        super().prepare(model, cache)
        mark_tokens(model)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`."""
        raise UserError(
            f"{type(self).__name__} finds sentences in the tokens that the decoder reads, and the decoder of a model with "
            "a think or chunk method does not read tokens; use SnapKV(1024)"
        )

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> Any:
        """See `KVCacheMethod.token_cache`: refused, also with one slot per token."""
        self.check_passes()

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> Tensor | None:
        """See `Policy.select_kv`."""
        end_BK = self.sentence_ends(layer, marked(layer, call.start, call.tokens))
        name = f"queries {table.first_head}"
        if not call.start:
            layer.state[name] = query_BGRTD[:, :, :, :0].detach()
            return None
        layer.state[name] = torch.cat([layer.state[name], query_BGRTD.detach()], dim=3)
        if CLOSED not in layer.state:  # the whole prompt may still be rolled back
            return None
        queries_BGRnD = layer.state[name][:, :, :, -max(self.longest, call.tokens) :]
        if call.tokens > 1:
            here_Bn = call.position_BT >= 0
        else:
            here_Bn = current(end_BK)[:, -queries_BGRnD.shape[3] :]
        score_BGS = self._scores(layer, table, queries_BGRnD[:, :, :, -here_Bn.shape[1] :], here_Bn, end_BK, call)
        count_BG = table.real.sum(-1)
        wanted_BG = (score_BGS == torch.inf).sum(-1).clamp(min=self.attended + call.tokens - 1)
        if call.tokens == 1:
            wanted_BG = torch.where(here_Bn.sum(-1, keepdim=True) <= self.dense, count_BG, wanted_BG)
        if bool((wanted_BG >= count_BG).all()):
            return None
        slot_BGk, kept_BGk = highest(score_BGS, table.position, wanted_BG.minimum(count_BG))
        return torch.where(kept_BGk, slot_BGk, -1)

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """See `Policy.evict_layer`; also rolls back the queries, and computes means where a sentence is complete."""
        super().evict_layer(layer)
        rolled_back = roll_back_marks(layer)
        for table in layer.tables:
            name = f"queries {table.first_head}"
            queries = layer.state[name]
            layer.state[name] = queries[:, :, :, : max(0, queries.shape[3] - rolled_back)][:, :, :, -self.longest :]
        end_BK = self.sentence_ends(layer, layer.state[MARKED])
        closed_B, evicted_B = end_BK.sum(-1), torch.full_like(layer.state["padding"], layer.evicted_until)
        if CLOSED in layer.state and torch.equal(closed_B, layer.state[CLOSED]):
            if torch.equal(evicted_B, layer.state[EVICTED]):
                return
        layer.state[CLOSED], layer.state[EVICTED] = closed_B, evicted_B
        for table in layer.tables:
            layer.state[f"means {table.first_head}"] = means(table, end_BK)

    def sentence_ends(self, layer: KVStoreLayer, marked_BK: Tensor) -> Tensor:
        """``[B, K]``: the last token of each sentence, also of padding and of one that is cut."""
        column_K = torch.arange(marked_BK.shape[1], device=marked_BK.device)
        end_BK = marked_BK | (column_K == layer.state["padding"][:, None] - 1)
        since_BK = column_K - torch.where(end_BK, column_K, -1).cummax(dim=1).values
        return end_BK | (since_BK % self.longest == 0)

    def _scores(
        self,
        layer: KVStoreLayer,
        table: KVStore,
        queries_BGRnD: Tensor,
        here_Bn: Tensor,
        end_BK: Tensor,
        call: AttentionCall,
    ) -> Tensor:
        """``[B, G, S]``: the product of each slot's sentence with the mean of the queries where `here_Bn` is true.

        ``inf`` for slots that are always attended to, ``-inf`` for empty ones.
        """
        number_BGS, closed_B = slot_sentences(table, end_BK), layer.state[CLOSED]
        always_BGS = (layer.number(table) < self.sinks) | (table.position >= call.start - self.recent)
        always_BGS = always_BGS | (number_BGS >= closed_B[:, None, None])
        means_BGND = layer.state[f"means {table.first_head}"]
        if not means_BGND.shape[2]:
            score_BGS = torch.zeros_like(always_BGS, dtype=torch.float32)
        else:
            query_BGD = torch.einsum("bgrnd,bn->bgd", queries_BGRnD.float(), here_Bn.float())
            query_BGD = query_BGD / here_Bn.sum(-1).clamp(min=1)[:, None, None]
            score_BGN = (means_BGND @ query_BGD[..., None])[..., 0]
            score_BGS = score_BGN.gather(2, number_BGS.clamp(max=score_BGN.shape[2] - 1))
        return score_BGS.masked_fill(always_BGS, torch.inf).masked_fill(~table.real, -torch.inf)


def current(end_BK: Tensor) -> Tensor:
    """``[B, K]``: the tokens after the latest end of a sentence."""
    return end_BK.flip(1).cumsum(1).flip(1) == 0


def slot_sentences(table: KVStore, end_BK: Tensor) -> Tensor:
    """``[B, G, S]``: the number of the sentence of each slot; 0 for slots without a token."""
    number_BK = end_BK.cumsum(1) - end_BK.long()
    at_BGS = table.position.clamp(min=0).long()
    return number_BK[:, None].expand(-1, at_BGS.shape[1], -1).gather(2, at_BGS)


def means(table: KVStore, end_BK: Tensor) -> Tensor:
    """``[B, G, N, D]``: the mean key of the slots of each complete sentence, 0 if it has none."""
    B, G, _, D = table.keys.shape
    N = int(end_BK.sum(-1).amax())
    number_BGS = torch.where(table.real, slot_sentences(table, end_BK), N).clamp(max=N)
    sum_BGND = torch.zeros(B, G, N + 1, D, device=table.keys.device)
    sum_BGND.scatter_add_(2, number_BGS[..., None].expand(-1, -1, -1, D), table.keys.detach().float())
    count_BGN = torch.zeros(B, G, N + 1, device=table.keys.device)
    count_BGN.scatter_add_(2, number_BGS, torch.ones_like(number_BGS, dtype=torch.float32))
    return (sum_BGND / count_BGN.clamp(min=1)[..., None])[:, :, :N]

"""A cache layer that stores KV slots; a policy selects the slots to attend to and the slots to evict.

Shapes: B batch, G KV heads, R query heads per KV head, T new tokens, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.native_attention import FEW, attend_natively
from pondera.cache.slot_attention import (
    BLOCK,
    PLAIN,
    AttentionObservation,
    Softmax,
    attend,
    attend_seen,
    grouped,
    scores,
    slots_allowed,
    slots_bias,
)
from pondera.core.errors import UserError

if TYPE_CHECKING:
    from pondera.methods.kv_cache.common.policy import Policy

DRAFTS = 256
"""The largest number of new tokens of a call that a rollback may remove while tokens are recorded."""


class KeepAll:
    """The policy of layers that keep every slot: it observes, selects and evicts nothing."""

    observation_window = 0
    sparse_attention = by_head = False
    exact = observes_scores = True

    @property
    def note_defaults(self) -> dict[str, float]:
        """No notes per slot."""
        return {}

    def observed_queries(self, layer: KVStoreLayer, call: AttentionCall) -> int:
        """0: observes no query."""
        return 0

    def evict_layer(self, layer: KVStoreLayer) -> None:
        """Evicts nothing."""

    def select_kv(self, layer: KVStoreLayer, table: KVStore, query_BGRTD: Tensor, call: AttentionCall) -> None:
        """Selects all slots."""

    def observe(self, layer: KVStoreLayer, table: KVStore, seen: AttentionObservation) -> None:
        """Never called."""


class KVStoreLayer(KVLayer):
    """The KV slots of one layer.

    Args:
        method: the policy.
        index: the index of the layer among the compressed ones.
        among: the number of compressed layers.

    Attributes:
        tables: one store for all KV heads, or one for each if the heads may keep different tokens.
        state: further numbers of the policy per batch row, ``[B, ...]`` each, by name.
        prompt: the number of tokens up to the end of the latest prompt. The first call is a prompt, and so is every later
            call of several tokens that are not draft tokens; tokens of later calls of one token are generated.
        evicted_until: the number of tokens seen at the latest eviction; a rollback to fewer tokens is not possible.
    """

    holds: ClassVar[tuple[str, ...]] = (*KVLayer.holds, "tables", "state", "prompt", "evicted_until")

    def __init__(self, method: Policy | KeepAll, index: int, among: int) -> None:
        super().__init__()
        self.method, self.index, self.among = method, index, among

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.tables: list[KVStore] = []
        self.state: dict[str, Tensor] = {}
        self.prompt = self.evicted_until = 0
        self._drafts: list[tuple[AttentionObservation, KVStore]] = []
        self._observed: list[KVStore] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`. Attends to all stored slots, including the new ones, before it evicts."""
        if not self.tables:
            self._begin(call)
        T = call.query_BHTD.shape[2]
        if call.start == 0 or (T > 1 and not self.record_past):
            self.prompt = self.seen
        if call.mask_B1TK is not None:
            self.state["padding"] = self.state["padding"] + call.padding_B
        query_BGRTD = grouped(call.query_BHTD, call.key_BGTD.shape[1])
        exact = (self.method.exact or T > FEW) and call.in_order
        chosen: list[Tensor | None] = []
        for table in self.tables:
            table.append(self._of(table, call.key_BGTD), self._of(table, call.value_BGTD), call.position)
            slot_BGk = None
            if self.method.sparse_attention:
                slot_BGk = self.method.select_kv(self, table, self._of(table, query_BGRTD), call)
            chosen.append(slot_BGk)
            exact = exact and table.whole and slot_BGk is None
        observed = self.method.observed_queries(self, call)
        if exact:
            out_BTHD = call.stock(*self.joined())
            for table in self.tables if observed else ():
                self._observe(call, self._of(table, query_BGRTD), table, observed)
        else:
            outputs = []
            for table, slot_BGk in zip(self.tables, chosen, strict=True):
                outputs.append(self._by_table(call, self._of(table, query_BGRTD), table, slot_BGk, observed))
            out_BTHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        if not (self.record_past or self.hold):
            self.method.evict_layer(self)
        return out_BTHD

    def _begin(self, call: AttentionCall) -> None:
        """Creates the stores and the state for the first call."""
        self.tables = [KVStore.like(call.key_BGTD, call.value_BGTD, self.method.note_defaults)]
        if self.method.by_head:
            self.tables = self.tables[0].split_heads()
        self.state["padding"] = torch.zeros(len(call.key_BGTD), dtype=torch.int64, device=call.key_BGTD.device)

    def _of(self, table: KVStore, rows_BG: Tensor) -> Tensor:
        """The rows of the heads of a store; a slice takes some microseconds, in every layer of every token."""
        return rows_BG if len(self.tables) == 1 else rows_BG[:, table.part]

    @property
    def at_prompt(self) -> bool:
        """Whether the latest token is the last one of a prompt."""
        return self.seen == self.prompt

    @property
    def stored(self) -> list[KVStore]:
        """Stores with all kept slots: `tables`, unless a layer stores some slots in another form."""
        return self.tables

    def joined(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, ``[B, G, S, D]``, if no head has evicted a slot."""
        if len(self.tables) == 1:
            return self.tables[0].keys, self.tables[0].values
        keys, values = zip(*((table.keys, table.values) for table in self.tables), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _by_table(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, slot_BGk: Tensor | None, observed: int
    ) -> Tensor:
        """Attention over the slots of a store, which are not all tokens of the sequence in order."""
        T = query_BGRTD.shape[3]
        if slot_BGk is None and observed >= T and self.method.observes_scores:
            outputs = self._observe(call, query_BGRTD, table, observed, attends=True)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        every, softmax = slice(0, T), call.softmax
        if softmax is not PLAIN:
            softmax = self._softmax(call, table)
        attended = None
        if softmax is PLAIN and call.key_bias_BK is None:
            if T == 1 and call.mask_B1TK is None:
                attended = table.attend(query_BGRTD, call.start, call.scaling, slot_BGk=slot_BGk)
            else:
                rows = (query_BGRTD, table.keys, table.values, table.position)
                attended = attend_natively(*rows, call.mask(every), call.start, call.scaling, slot_BGk=slot_BGk)
        if attended is None:
            keys, values, position = table.keys, table.values, table.position
            if slot_BGk is not None:
                there_BGk = slot_BGk.clamp(min=0)
                keys, values = (_chosen(rows, there_BGk) for rows in (keys, values))
                position = torch.where(slot_BGk < 0, EMPTY, position.gather(2, there_BGk))
            bias = None if call.key_bias_BK is None else slots_bias(call.key_bias_BK, position)
            allowed = slots_allowed(call.written_mask(every), position)
            out_BTHD = attend(query_BGRTD, keys, values, allowed, call.scaling, softmax, bias)
        else:
            out_BTHD = attended.out_BTHD
        if observed:
            self._observe(call, query_BGRTD, table, observed)
        return out_BTHD

    def _observe(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, observed: int, attends: bool = False
    ) -> list[Tensor]:
        """Passes the scores of the last `observed` queries to the policy, in blocks of at most about `BLOCK` scores.

        Returns the output of attention of each block if `attends`, else nothing; the scores of one block exist at a time.
        """
        T = query_BGRTD.shape[3]
        begin = max(0, T - observed)
        numbers = table.used if self.method.observes_scores else query_BGRTD.shape[4]
        block = max(1, BLOCK // max(1, math.prod(query_BGRTD.shape[:3]) * numbers))
        # Observations of possible draft tokens wait for `crop`, in separate blocks.
        drafts = max(begin, T - DRAFTS) if self.record_past else T
        edges = [*range(begin, drafts, block), *range(drafts, T, block), T]
        outputs = []
        for first, last in itertools.pairwise(edges):
            # Only the first of several passes of a call begins an observation.
            begins = first == begin and table not in self._observed
            seen = self._seen(call, query_BGRTD, table, slice(first, last), begins)
            if self.hold:
                self._observed.append(table)
            if first >= drafts:
                self._drafts.append((seen, table))
            else:
                self.method.observe(self, table, seen)
            if attends:
                outputs.append(attend_seen(seen, table.values))
        return outputs

    def _softmax(self, call: AttentionCall, table: KVStore) -> Softmax:
        """The softmax for the heads of a store."""
        if call.softmax.sink_H is None or len(self.tables) == 1:
            return call.softmax
        return call.softmax.of(table.part, len(self.tables))

    def _seen(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, part: slice, begins: bool
    ) -> AttentionObservation:
        """The observation of some queries."""
        query_BGRTD, number, softmax = query_BGRTD[:, :, :, part], call.start + part.start, call.softmax
        if softmax is not PLAIN:
            softmax = self._softmax(call, table)
        number_T = torch.arange(number, call.start + part.stop, device=query_BGRTD.device)
        real_BT = call.real(part)
        if not self.method.observes_scores:
            none_BGRT0 = query_BGRTD[..., :0]
            return AttentionObservation(
                query_BGRTD, none_BGRT0, number_T, real_BT, call.scaling, begins, softmax=softmax
            )
        attended = None
        bias = None if call.key_bias_BK is None else slots_bias(call.key_bias_BK, table.position)
        if softmax is PLAIN and bias is None:
            if call.tokens == 1 and call.mask_B1TK is None:
                attended = table.attend(query_BGRTD, number, call.scaling, with_scores=True)
            else:
                rows = (query_BGRTD, table.keys, table.values, table.position)
                attended = attend_natively(*rows, call.mask(part), number, call.scaling, with_scores=True)
        out_BTHD, score_BGRTS = (None, None) if attended is None else attended
        if score_BGRTS is None:
            allowed = slots_allowed(call.written_mask(part), table.position)
            score_BGRTS = scores(query_BGRTD, table.keys, allowed, call.scaling, softmax, bias)
        return AttentionObservation(
            query_BGRTD,
            score_BGRTS,
            number_T,
            real_BT,
            call.scaling,
            begins,
            out_BTHD,
            softmax,
            all_real=call.mask_B1TK is None,
        )

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`."""
        was_held, self._observed = self.hold, []
        super().release(prompt)
        if not was_held or not self.tables:
            return
        if prompt:
            self.prompt = self.seen
        if not self.record_past:
            self.method.evict_layer(self)

    def check_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.check_columns`."""
        gone = (~keep_C).nonzero()
        if len(gone) and int(gone[0]) < self.evicted_until:
            raise UserError(
                f"crop: cannot roll back {len(gone)} of the latest {self.seen - int(gone[0])} slots, because slots have been "
                "evicted after them; call cache.activate_past_recording() before a call with draft tokens"
            )

    def keep_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.keep_columns`. Rolled-back draft tokens do not influence evictions."""
        number_C = torch.cat([keep_C.cumsum(0) - 1, keep_C.new_zeros(1, dtype=torch.long)]).to(torch.int32)
        self.prompt = int(keep_C[: self.prompt].sum())
        self.evicted_until = int(keep_C[: self.evicted_until].sum())
        self.seen = int(keep_C.sum())
        for table in self.tables:
            table.renumber(keep_C, number_C)
        for seen, table in self._drafts:
            stays = keep_C[seen.number_T].nonzero()[:, 0]
            if len(stays):
                seen = seen.some(stays, table.used)
                self.method.observe(self, table, replace(seen, number_T=number_C[seen.number_T].long()))
        self._drafts = []
        self.method.evict_layer(self)

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`."""
        if tokens < self.evicted_until or (self.method.observation_window and self.seen - tokens > DRAFTS):
            raise UserError(
                f"crop: cannot roll back the last {self.seen - tokens} of {self.seen} tokens, because tokens have been "
                "evicted or scored with them; call cache.activate_past_recording() before a call with draft tokens"
            )

    def rollback(self, tokens: int) -> None:
        """See `KVLayer.rollback`."""
        self.seen = tokens
        self.prompt = min(self.prompt, tokens)
        for table in self.tables:
            table.truncate(tokens)
        for seen, table in self._drafts:
            if stays := int((seen.number_T < tokens).sum()):
                self.method.observe(self, table, seen.some(slice(stays), table.used))
        self._drafts = []
        self.method.evict_layer(self)

    def select(self, rows: Tensor) -> None:
        """See `BatchState.select`; also the observations of draft tokens."""
        super().select(rows)
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self._drafts = [(seen.rows(rows), table) for seen, table in self._drafts]

    def real_tokens(self, budget_from_prompt: bool = False) -> list[int]:
        """For each batch row, the number of tokens seen, or of its prompt, without padding."""
        return ((self.prompt if budget_from_prompt else self.seen) - self.state["padding"]).tolist()

    def unused_bytes(self) -> int:
        """Bytes of storage that is allocated for later tokens."""
        pairs = ((table.keys_BGSD, table.used) for table in self.tables)
        values = ((table.values_BGSD, table.used) for table in self.tables)
        return sum(rows[:, :, used:].numel() * rows.element_size() for rows, used in (*pairs, *values))

    def number(self, table: KVStore) -> Tensor:
        """``[B, G, S]``: the index of each slot's token in its sequence, padding not counted."""
        return table.position - self.state["padding"][:, None, None]


def _chosen(rows_BGSD: Tensor, slot_BGk: Tensor) -> Tensor:
    return rows_BGSD.gather(2, slot_BGk[..., None].expand(*slot_BGk.shape, rows_BGSD.shape[-1]))

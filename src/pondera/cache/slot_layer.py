"""A cache layer that keeps a table of slots and asks a memory which of them to attend to and which to forget.

Shapes: B batch, G KV heads, R query heads per KV head, T new tokens, S slots, k chosen slots, D head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
"""The latest tokens of a call that may be taken back while tokens are recorded."""


class KVStoreLayer(KVLayer):
    """One layer's past as slots.

    Args:
        method: decides.
        index: of the layer among the compressed ones.
        among: how many are compressed.

    Attributes:
        tables: one for all KV heads, or one for each where their budgets differ.
        state: whatever else the memory notes per row of the batch, ``[B, ...]`` each, by name.
        prompt: tokens up to the end of the latest prompt. The first call is one, and so is every later call of several
            tokens that are no drafts; tokens that come one by one are generated.
        forgotten: tokens up to here may have been evicted_until, so that they cannot be taken back.
    """

    holds: ClassVar[tuple[str, ...]] = ("tables", "state", "prompt", "evicted_until")

    def __init__(self, method: Policy, index: int, among: int) -> None:
        super().__init__()
        self.method, self.index, self.among = method, index, among
        self.tables: list[KVStore] = []
        self.state: dict[str, Tensor] = {}
        self.prompt = self.evicted_until = 0
        self._drafts: list[tuple[AttentionObservation, KVStore]] = []
        self._observed: list[KVStore] = []

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`. Attends first to all that is there, the new tokens included, and forgets then."""
        first = not self.tables
        if first:
            self.tables = [KVStore.like(call.key_BGTD, call.value_BGTD, self.method.note_defaults)]
            if self.method.by_head:
                self.tables = self.tables[0].split_heads()
        if call.start == 0 or (call.tokens > 1 and not self.record_past):
            self.prompt = self.seen
        position_BT = call.position_BT
        if first:
            self.state["padding"] = torch.zeros(len(position_BT), dtype=torch.int64, device=position_BT.device)
        self.state["padding"] = self.state["padding"] + call.padding_B
        query_BGRTD = grouped(call.query_BHTD, call.key_BGTD.shape[1])
        exact = (self.method.exact or call.tokens > FEW) and call.in_order
        chosen: list[Tensor | None] = []
        for heads, table in self.parts():
            table.append(call.key_BGTD[:, heads], call.value_BGTD[:, heads], position_BT)
            slot_BGk = self._choice(call, query_BGRTD[:, heads], table) if self.method.sparse_attention else None
            chosen.append(slot_BGk)
            exact = exact and table.whole and slot_BGk is None
        if exact:
            out_BTHD = call.stock(*self._joined())
            self._watch(call, query_BGRTD, position_BT)
        else:
            out_BTHD = self._by_table(call, query_BGRTD, position_BT, chosen)
        if not (self.record_past or self.hold):
            self._evict()
        return out_BTHD

    @property
    def at_prompt(self) -> bool:
        """The latest token is the last of a prompt."""
        return self.seen == self.prompt

    def parts(self) -> list[tuple[slice, KVStore]]:
        """The tables and the KV heads that each is for."""
        if len(self.tables) == 1:
            return [(slice(None), self.tables[0])]
        return [(slice(head, head + 1), table) for head, table in enumerate(self.tables)]

    def heads(self, part: slice) -> list[int]:
        """The numbers of the KV heads that a table is for."""
        if len(self.tables) == 1:
            return list(range(self.tables[0].keys_BGSD.shape[1]))
        return list(range(sum(table.keys_BGSD.shape[1] for table in self.tables)))[part]

    def _joined(self) -> tuple[Tensor, Tensor]:
        if len(self.tables) == 1:
            return self.tables[0].keys, self.tables[0].values
        keys, values = zip(*((table.keys, table.values) for table in self.tables), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _choice(self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore) -> Tensor | None:
        return self.method.select_kv(self, table, query_BGRTD, call)

    def _by_table(
        self, call: AttentionCall, query_BGRTD: Tensor, position_BT: Tensor, chosen: list[Tensor | None]
    ) -> Tensor:
        """Attention where slots are not the tokens of the text in their order."""
        if len(chosen) == 1:
            return self._of_table(call, query_BGRTD, self.tables[0], position_BT, chosen[0])
        found = [
            self._of_table(call, query_BGRTD[:, heads], table, position_BT, slot_BGk)
            for (heads, table), slot_BGk in zip(self.parts(), chosen, strict=True)
        ]
        return torch.cat(found, dim=2)

    def _of_table(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, position_BT: Tensor, slot_BGk: Tensor | None
    ) -> Tensor:
        if slot_BGk is None and self.method.observed_queries(self, call) >= call.tokens:
            observed = self._observe(call, query_BGRTD, table, position_BT)
            found = list(map(attend_seen, observed, itertools.repeat(table.values)))
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)
        keys, values, position = table.keys, table.values, table.position
        if slot_BGk is not None:
            there_BGk = slot_BGk.clamp(min=0)
            keys, values = (_chosen(rows, there_BGk) for rows in (keys, values))
            position = torch.where(slot_BGk < 0, EMPTY, position.gather(2, there_BGk))
        every, softmax = slice(0, call.tokens), call.softmax
        if softmax is not PLAIN:
            softmax = self._softmax(call, table)
        found = None
        bias = None if call.key_bias_BK is None else slots_bias(call.key_bias_BK, position)
        if softmax is PLAIN and bias is None:
            found = attend_natively(query_BGRTD, keys, values, position, call.mask(every), call.start, call.scaling)
        if found is None:
            allowed = slots_allowed(call.written_mask(every), position)
            out_BTHD = attend(query_BGRTD, keys, values, allowed, call.scaling, softmax, bias)
        else:
            out_BTHD = found.out_BTHD
        for _ in self._observe(call, query_BGRTD, table, position_BT):
            pass
        return out_BTHD

    def _watch(self, call: AttentionCall, query_BGRTD: Tensor, position_BT: Tensor) -> None:
        """Shows the memory what the queries looked at, where attention itself did not."""
        for heads, table in self.parts():
            for _ in self._observe(call, query_BGRTD[:, heads], table, position_BT):
                pass

    def _observe(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, position_BT: Tensor
    ) -> Iterator[AttentionObservation]:
        """Shows the memory the last queries of a call, in blocks whose scores fit into memory."""
        T = query_BGRTD.shape[3]
        begin = T - min(T, self.method.observed_queries(self, call))
        if begin == T:
            return
        block = max(1, BLOCK // max(1, math.prod(query_BGRTD.shape[:3]) * table.used))
        # What may be a draft is noted until it is settled, and stands in blocks of its own.
        drafts = max(begin, T - DRAFTS) if self.record_past else T
        edges = [*range(begin, drafts, block), *range(drafts, T, block), T]
        for first, last in itertools.pairwise(edges):
            # The passes of one call are one observation.
            begins = first == begin and not any(table is known for known in self._observed)
            seen = self._seen(call, query_BGRTD, table, position_BT, slice(first, last), begins)
            if self.hold:
                self._observed.append(table)
            if first >= drafts:
                self._drafts.append((seen, table))
            else:
                self.method.observe(self, table, seen)
            yield seen

    def _softmax(self, call: AttentionCall, table: KVStore) -> Softmax:
        """How the scores of a table's heads become weights."""
        if call.softmax.sink_H is None or len(self.tables) == 1:
            return call.softmax
        head = next(head for head, other in enumerate(self.tables) if other is table)
        return call.softmax.of(slice(head, head + 1), len(self.tables))

    def _seen(
        self, call: AttentionCall, query_BGRTD: Tensor, table: KVStore, position_BT: Tensor, part: slice, begins: bool
    ) -> AttentionObservation:
        """What some queries look at."""
        query_BGRTD, number, softmax = query_BGRTD[:, :, :, part], call.start + part.start, call.softmax
        if softmax is not PLAIN:
            softmax = self._softmax(call, table)
        found = None
        bias = None if call.key_bias_BK is None else slots_bias(call.key_bias_BK, table.position)
        if softmax is PLAIN and bias is None:
            rows = (query_BGRTD, table.keys, table.values, table.position)
            found = attend_natively(*rows, call.mask(part), number, call.scaling, with_scores=True)
        out_BTHD, score_BGRTS = (None, None) if found is None else found
        if score_BGRTS is None:
            allowed = slots_allowed(call.written_mask(part), table.position)
            score_BGRTS = scores(query_BGRTD, table.keys, allowed, call.scaling, softmax, bias)
        number_T = torch.arange(number, call.start + part.stop, device=query_BGRTD.device)
        real_BT = position_BT[:, part] >= 0
        return AttentionObservation(
            query_BGRTD, score_BGRTS, number_T, real_BT, call.scaling, begins, out_BTHD, softmax
        )

    def _evict(self) -> None:
        """Brings every table within its budget."""
        if self.method.evict_layer(self):
            self.evicted_until = self.seen

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`."""
        held, self._observed = self.hold, []
        super().release(prompt)
        if not held or not self.batch():
            return
        if prompt:
            self.prompt = self.seen
        if not self.record_past:
            self._evict()

    def keep_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.keep_columns`. Drafts that go have had no say in what is kept."""
        gone = (~keep_C).nonzero()
        if len(gone) and int(gone[0]) < self.evicted_until:
            raise UserError(
                f"crop: {len(gone)} of the latest {self.seen - int(gone[0])} slots are to be taken back, and others have been "
                "evicted for their sake already; call cache.activate_past_recording() before tokens that may be drafts"
            )
        number_C = torch.cat([keep_C.cumsum(0) - 1, keep_C.new_zeros(1, dtype=torch.long)]).to(torch.int32)
        for seen, table in self._drafts:
            stays_T = keep_C[seen.number_T]
            self.method.observe(
                self, table, replace(seen, real_BT=seen.real_BT & stays_T).first(len(stays_T), table.used)
            )
        self._drafts = []
        for table in self.tables:
            table.renumber(keep_C, number_C)
        self.prompt = int(keep_C[: self.prompt].sum())
        self.evicted_until = int(keep_C[: self.evicted_until].sum())
        self.seen = int(keep_C.sum())
        self._evict()

    def rollback(self, tokens: int) -> None:
        """See `KVLayer.rollback`."""
        if tokens < self.evicted_until or (self.method.observation_window and self.seen - tokens > DRAFTS):
            raise UserError(
                f"crop: the last {self.seen - tokens} of {self.seen} tokens are to be taken back, and others have been "
                "forgotten for their sake already; call cache.activate_past_recording() before tokens that may be drafts"
            )
        self.seen = tokens
        self.prompt = min(self.prompt, tokens)
        for table in self.tables:
            table.crop(tokens)
        for seen, table in self._drafts:
            if stays := int((seen.number_T < tokens).sum()):
                self.method.observe(self, table, seen.first(stays, table.used))
        self._drafts = []
        self._evict()

    def real_tokens(self, budget_from_prompt: bool = False) -> list[int]:
        """Tokens seen in each row of the batch, or those of its prompt, without padding."""
        return ((self.prompt if budget_from_prompt else self.seen) - self.state["padding"]).tolist()

    def number(self, table: KVStore) -> Tensor:
        """``[B, G, S]``: where in its text each slot's token stands, padding not counted."""
        return table.position - self.state["padding"][:, None, None]

    def nbytes(self) -> int:
        """See `KVLayer.nbytes`."""
        return sum(table.nbytes() for table in self.tables)

    def select(self, rows: Tensor) -> None:
        """See `KVLayer.select`."""
        for table in self.tables:
            table.select(rows)
        self.state = {name: value[rows.to(value.device)] for name, value in self.state.items()}

    def clear(self) -> None:
        """See `KVLayer.clear`."""
        self.tables, self.state, self._drafts, self.prompt, self.evicted_until = [], {}, [], 0, 0
        self._observed = []

    def batch(self) -> int:
        """See `KVLayer.batch`."""
        return len(self.tables[0].keys_BGSD) if self.tables else 0


def _chosen(rows_BGSD: Tensor, slot_BGk: Tensor) -> Tensor:
    return rows_BGSD.gather(2, slot_BGk[..., None].expand(*slot_BGk.shape, rows_BGSD.shape[-1]))

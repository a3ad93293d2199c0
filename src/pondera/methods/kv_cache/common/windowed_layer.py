"""A cache layer with exact sinks, an exact recent window, and codes of all tokens between them.

Shapes: B batch, G KV heads, R query heads per KV head, T new tokens, S tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Codes
from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.native_sections import NativeSection
from pondera.cache.ring_buffer import RingBuffer
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.cache_sections import (
    CacheSection,
    CodedSection,
    DenseSection,
    attend_to_sections,
)
from pondera.methods.kv_cache.common.window_step import WindowStep, supports

if TYPE_CHECKING:
    from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache


class SinkWindowLayer(KVLayer):
    """One cache layer with sinks, codes and an exact window; see `SinkWindowCache`.

    Args:
        method: sets the sizes of the sections.
        keys, values: the codecs.

    Attributes:
        pads: number of padding tokens before the sequence of each batch row.
        begins: position id of the first token of each row.
        coded: number of encoded tokens of each row.
        codes: of keys and of values, in the order of the encoded tokens.
        ring: exact keys and values of the latest tokens; of all tokens before the first encoding.
    """

    holds: ClassVar[tuple[str, ...]] = (*KVLayer.holds, "codes", "sink_keys", "sink_values", "ring")
    by_row: ClassVar[tuple[str, ...]] = ("pads", "begins", "coded")

    def __init__(self, method: SinkWindowCache, keys: Codec, values: Codec) -> None:
        super().__init__()
        self.method, self.coders = method, (keys, values)
        if odd := [codec.unit for codec in self.coders if method.flush_size % codec.unit]:
            raise UserError(
                f"flush_size={method.flush_size}: its codec encodes {odd[0]} tokens at once; give a multiple of it"
            )

    def clear(self) -> None:
        """See `CacheState.clear`."""
        super().clear()
        self.pads: list[int] = []
        self.begins: list[int] = []
        self.coded: list[int] = []
        self.codes = (Codes(), Codes())
        self.sink_keys = self.sink_values = torch.empty(0)
        self.ring = RingBuffer(self.sink_keys, self.sink_values)
        self._step: WindowStep | None = None

    # Attention and encoding

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`. Attends to all sections, new tokens exactly; then encodes."""
        out_BTHD = self._natively(call)
        if out_BTHD is not None:
            return out_BTHD
        if not self.batch():
            self._begin(call)
        self._start_texts(call)
        self._keep_sinks(call)
        if call.tokens == 1:
            self.ring.append(call.key_BGTD, call.value_BGTD)
            pieces = list(self.ring.pieces(self._exact_from(), self.ring.end))
        else:
            pieces = [(self.ring.first, *self.ring.extend(call.key_BGTD, call.value_BGTD))]
        if call.in_order and self.ring.first == 0 and not any(self.coded):
            out_BTHD = call.stock(*self.ring.read(0, self.ring.end))
        else:
            out_BTHD = self._by_segments(call, pieces)
        if not (self.record_past or self.hold):
            self._settle()
        elif self.ring.borrowed:
            self.ring.resize(len(self.ring) + max(16, len(self.ring) // 8))
        return out_BTHD

    def _begin(self, call: AttentionCall) -> None:
        """Allocates storage for a batch."""
        B = len(call.key_BGTD)
        # A sequence starts after its padding; until its first token, the value is the end of the last call.
        self.pads, self.begins, self.coded = [call.start] * B, [call.start] * B, [0] * B
        self.sink_keys, self.sink_values = (
            rows.new_zeros(B, rows.shape[1], self.method.sinks, rows.shape[-1])
            for rows in (call.key_BGTD, call.value_BGTD)
        )
        self.ring = RingBuffer(call.key_BGTD[:, :, :0], call.value_BGTD[:, :, :0])

    def _start_texts(self, call: AttentionCall) -> None:
        """Sets where the sequences start whose first token is in this call."""
        waiting = [row for row, pads in enumerate(self.pads) if pads == call.start]
        if not waiting:
            return
        real_BT = (call.position_BT >= 0).cpu()
        ids = call.further.get("position_ids")
        for row in waiting:
            real = real_BT[row].nonzero()
            first = int(real[0]) if len(real) else call.tokens
            self.pads[row] = self.begins[row] = call.start + first
            if first == call.tokens:
                continue
            if ids is not None:
                self.begins[row] = int(ids.expand(len(self.pads), -1)[row, first])
            elif any(codec.needs_position for codec in self.coders):
                raise UserError(
                    f"{type(self.method).__name__}: this model does not pass position ids to its attention layers, but "
                    'key_stage="pre_rope" needs them; use key_stage="post_rope"'
                )

    def _keep_sinks(self, call: AttentionCall) -> None:
        """Stores the new tokens that are sinks."""
        self._keep_sinks_of(call.start, call.key_BGTD, call.value_BGTD)

    def _keep_sinks_of(self, begin: int, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        end = begin + key_BGTD.shape[2]
        for row, pads in enumerate(self.pads):
            start, stop = max(begin, pads), min(end, pads + self.method.sinks)
            if start < stop:
                new, place = slice(start - begin, stop - begin), slice(start - pads, stop - pads)
                self.sink_keys[row, :, place] = key_BGTD[row, :, new]
                self.sink_values[row, :, place] = value_BGTD[row, :, new]

    def exact_after(self) -> list[int]:
        """For each row, the number of the first token that is neither a sink nor encoded."""
        return [pads + self.method.sinks + coded for pads, coded in zip(self.pads, self.coded, strict=True)]

    def _exact_from(self) -> int:
        """The minimum of `exact_after` over all rows."""
        return min(self.ring.end, *self.exact_after())

    def _settle(self) -> None:
        """Encodes the tokens that left the recent window, and frees their keys and values."""
        every, window, room = self.method.flush_size, self.method.window, self._room
        due = [max(0, self.ring.end - exact - window) // every * every for exact in self.exact_after()]
        if any(due):
            for row, start, tokens in self._alike(due):
                self._code(row, start, tokens)
            self.coded = [coded + tokens for coded, tokens in zip(self.coded, due, strict=True)]
        self.ring.drop(self._exact_from() if any(self.coded) else self.ring.end - room + 1)
        if self.ring.borrowed or self.ring.room > room:
            # The storage of short sequences grows with them.
            self.ring.resize(room if any(self.coded) else min(room, len(self.ring) + max(16, len(self.ring) // 8)))

    @property
    def _room(self) -> int:
        """Maximum number of exact tokens, including the next one."""
        return self.method.sinks + self.method.window + self.method.flush_size

    def _alike(self, due: list[int]) -> Iterator[tuple[slice, int, int]]:
        """Batch slices to encode, all rows at once if they agree, with first token number and token count."""
        plans = list(zip(self.exact_after(), due, strict=True))
        if len({(*plan, coded) for plan, coded in zip(plans, self.coded, strict=True)}) == 1:
            yield slice(None), *plans[0]
            return
        for row, (start, tokens) in enumerate(plans):
            if tokens:
                yield slice(row, row + 1), start, tokens

    def _code(self, row: slice, start: int, tokens: int) -> None:
        first = row.start or 0
        rows = self.ring.read(start, start + tokens, row)
        position_BS = self._position(self.coded[first], tokens)[row]
        for codec, codes, x_BGSD in zip(self.coders, self.codes, rows, strict=True):
            parts = codec.encode(x_BGSD, position_BS)
            codes.write(codec, parts, row, self.coded[first], tokens, self.batch())

    def _position(self, start: int, tokens: int) -> Tensor:
        """``[B, S]``: position ids of encoded tokens."""
        start += self.method.sinks
        if self.positions is not None:
            return self.positions[None, start : start + tokens]
        first_B = torch.tensor(self.begins, device=self.ring.keys.device)
        number_S = torch.arange(start, start + tokens, device=first_B.device)
        return first_B[:, None] + number_S.div(self.slots_per_token, rounding_mode="floor")

    # Attention over the sections

    def _by_segments(self, call: AttentionCall, pieces: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        """Attention over all sections together."""
        R = call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
        return attend_to_sections(call, self._segments(call, pieces, R * call.tokens))

    def _natively(self, call: AttentionCall) -> Tensor | None:
        """`attend` for one token in one native call, once tokens are encoded; `None` if it does not support call or state."""
        ring = self.ring
        if not any(self.coded) or ring.borrowed or len(ring) >= ring.room or not supports(call):
            return None
        if call.start < max(self.pads) + self.method.sinks:  # a row still begins
            return None
        step = self._step
        if step is None or not step.fits(self, call):
            step = self._step = WindowStep.of(self, call)
        out_B1HD = None if step is None else step(self, call)
        if out_B1HD is None:
            return None
        if not (self.record_past or self.hold) and (
            ring.end - min(self.exact_after()) - self.method.window >= self.method.flush_size or ring.room > self._room
        ):
            self._settle()
        return out_B1HD

    def native_codes(self) -> NativeSection | None:
        """The encoded tokens for the kernel; `None` if it does not support them."""
        codes = [each.view(codec) for each, codec in zip(self.codes, self.coders, strict=True)]
        steady = self.positions is None and self.slots_per_token == 1
        first = [begins + self.method.sinks for begins in self.begins] if steady else None
        keys, values = (
            codec.kernel_rows(parts, first, of_keys)
            for codec, parts, of_keys in zip(self.coders, codes, (True, False), strict=True)
        )
        if keys is None or values is None or values.order:
            return None
        return NativeSection(keys, values, max(self.coded), [(0, coded) for coded in self.coded])

    def _segments(
        self, call: AttentionCall, pieces: list[tuple[int, Tensor, Tensor]], queries: int
    ) -> list[CacheSection]:
        """All sections of the cache, without those that are empty in every row."""
        end, sinks = call.start + call.tokens, self.method.sinks
        valid = [(0, min(sinks, max(0, end - pads))) for pads in self.pads]
        sections: list[CacheSection] = []
        if sinks:
            sections.append(DenseSection(list(self.pads), valid, self.sink_keys, self.sink_values))
        if any(self.coded):
            firsts, valid = [pads + sinks for pads in self.pads], [(0, coded) for coded in self.coded]
            coded = CodedSection(firsts, valid, self.coders, self.codes, self._position(0, max(self.coded)))
            few = queries <= min(self.coders[0].queries, self.coders[1].queries)
            sections.append(coded if few else coded.dense())
        for first, keys, values in pieces:
            valid = [(max(0, exact - first), keys.shape[2]) for exact in self.exact_after()]
            sections.append(DenseSection([first] * len(valid), valid, keys, values))
        return sections

    def restored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes the whole cache, in no particular order.

        Returns:
            Keys and values ``[B, G, S, D]``, and their token numbers ``[B, S]``, negative for empty entries.
        """
        pieces = list(self.ring.pieces(self._exact_from(), self.ring.end))
        none_BG0D = self.ring.keys[:, :, :0]
        call = AttentionCall(torch.nn.Module(), none_BG0D, none_BG0D, none_BG0D, None, 1.0, self.seen)
        dense = [part.dense() if isinstance(part, CodedSection) else part for part in self._segments(call, pieces, 0)]
        keys, values = (torch.cat([getattr(part, name) for part in dense], 2) for name in ("keys", "values"))
        numbers = [torch.where(part.within(keys.device), part.number(keys.device), -1) for part in dense]
        return keys, values, torch.cat(numbers, 1)

    # Cache operations

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`."""
        on_hold = self.hold
        super().release(prompt)
        if on_hold and self.batch() and not self.record_past:
            self._settle()

    def check_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.check_columns`; slots to remove must still be exact, unless all later slots go, too."""
        gone = (~keep_C).nonzero()
        first = int(gone[0]) if len(gone) else self.seen
        if bool(keep_C[first:].any()) and first < self._exact_from():
            raise UserError(
                f"crop: {len(gone)} of the latest {self.seen - first} slots cannot be rolled back, because some are "
                "encoded; call cache.activate_past_recording() before tokens that may be rolled back"
            )
        self.check_rollback(first)

    def keep_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.keep_columns`."""
        gone = (~keep_C).nonzero()
        first = int(gone[0]) if len(gone) else self.seen
        stays = keep_C[first:].nonzero()[:, 0]
        rows = [each.index_select(2, stays) for each in self.ring.read(max(first, self.ring.first), self.ring.end)]
        self.hold = True
        self.rollback(first)
        for number in range(len(stays)):
            self.ring.append(*(each[:, :, number : number + 1] for each in rows))
        self._keep_sinks_of(first, *rows)
        self.seen = first + len(stays)
        self.hold = False
        self._settle()

    def _coded_after(self, tokens: int) -> list[int]:
        """For each row, the number of encoded tokens among the first `tokens`."""
        return [min(c, max(0, tokens - p - self.method.sinks)) for c, p in zip(self.coded, self.pads, strict=True)]

    def check_rollback(self, tokens: int) -> None:
        """See `CacheState.check_rollback`; tokens that were encoded together go together."""
        unit = max(codec.unit for codec in self.coders)
        coded = self._coded_after(tokens)
        if any(now != before and now % unit for now, before in zip(coded, self.coded, strict=True)):
            raise UserError(
                f"crop: the last {self.seen - tokens} of {self.seen} tokens cannot be rolled back, because tokens "
                f"that stay were coded together with them, {unit} at a time; call cache.activate_past_recording() "
                "before tokens that may be rolled back"
            )

    def rollback(self, tokens: int) -> None:
        """See `KVLayer.rollback`; encoded tokens stay encoded, so the exact window may be shorter for some steps."""
        self.coded, self.seen = self._coded_after(tokens), tokens
        self.pads = [min(pads, tokens) for pads in self.pads]
        self.ring.truncate(tokens)
        for codes in self.codes:
            codes.truncate(max(self.coded))
        if not self.hold:
            self._settle()

    def select(self, rows: Tensor) -> None:
        """See `BatchState.select`; the longest row may be gone."""
        super().select(rows)
        for codes in self.codes:
            codes.truncate(max(self.coded))

    def code_bytes(self) -> int:
        """Bytes of the codes in use, without unused capacity and exact tokens."""
        return sum(codes.live_bytes(codec) for codes, codec in zip(self.codes, self.coders, strict=True))

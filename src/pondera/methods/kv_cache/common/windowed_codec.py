"""KV cache with exact sinks, an exact recent window, and codes of all tokens between them.

Shapes: B batch, G KV heads, R query heads per KV head, T new tokens, t queries of a block, N = R * t, S tokens of a
segment, K tokens seen and new, D head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Codes, Parts
from pondera.cache.layer import AttentionCall, KVLayer
from pondera.cache.ring_buffer import RingBuffer
from pondera.cache.slot_attention import BLOCK, grouped
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.base import KVCacheMethod


class SinkWindowCache(KVCacheMethod):
    """A KV cache method that keeps the first and the latest tokens exactly, and codes of all tokens between them.

    A call attends to its new tokens exactly; then the layer encodes the tokens that left the recent window, and frees
    their exact keys and values. It encodes tokens in groups of `flush_size`, counted from the first token of their
    sequence, so the result depends only on the length of the sequence: not on padding, other batch rows or chunked
    prefill.

    Encoded tokens stay encoded: a rollback truncates codes, and the exact window is shorter until new tokens fill it.
    After ``cache.activate_past_recording()`` the layer encodes nothing until `crop` determines which tokens stay, so
    rejected tokens leave no trace.

    Left padding takes no memory. The mask hides padding within or after a sequence, but it takes a KV slot. The codec
    encodes keys after rotary embedding, so a padded row equals the same sequence alone only with the same position ids;
    `generate` passes such ids, while a plain call without ``position_ids`` counts padding.

    Args:
        window: number of latest tokens that stay exact; up to ``window + flush_size - 1`` of them do.
        sinks: number of first tokens of a sequence that stay exact.
        flush_size: number of tokens that the layer encodes at a time.
    """

    exact: bool = True
    """Before a layer encodes its first token, attention uses the stock kernel, so that results are bit-identical."""

    def __init__(self, window: int, sinks: int, flush_size: int) -> None:
        super().__init__()
        for name, number, least in (("window", window, 0), ("sinks", sinks, 0), ("flush_size", flush_size, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UserError(f"{name}={number!r}: give a number of tokens, {least} or more")
        self.window, self.sinks, self.flush_size = window, sinks, flush_size

    @abstractmethod
    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """The codecs of a layer's keys and values.

        Args:
            config: text config of the model.
            index: of the layer among the compressed ones.
        """

    @abstractmethod
    def rate(self, config: PreTrainedConfig) -> float:
        """Actual bits per cached number of encoded tokens, which can be lower than the requested bits.

        Args:
            config: text config of the model.
        """

    @property
    def needs_rows_of_config(self) -> bool:
        """See `KVCacheMethod.needs_rows_of_config`: codecs do."""
        return True

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> SinkWindowLayer:
        """See `KVCacheMethod.layer`."""
        return SinkWindowLayer(self, *self.coders(config, index))


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

    # Attention and encoding

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`. Attends to all sections, new tokens exactly; then encodes."""
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

    def _exact_after(self, row: int) -> int:
        """The number of the first token of a row that is neither a sink nor encoded."""
        return self.pads[row] + self.method.sinks + self.coded[row]

    def _exact_from(self) -> int:
        """The minimum of `_exact_after` over all rows."""
        return min(self.ring.end, *map(self._exact_after, range(self.batch())))

    def _settle(self) -> None:
        """Encodes the tokens that left the recent window, and frees their keys and values."""
        every, window, room = self.method.flush_size, self.method.window, self._room
        over = [self.ring.end - self._exact_after(row) - window for row in range(self.batch())]
        due = [max(0, tokens) // every * every for tokens in over]
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
        plans = [(self._exact_after(row), tokens) for row, tokens in enumerate(due)]
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
        """Softmax attention over all sections together."""
        G = call.key_BGTD.shape[1]
        query_BGRTD = grouped(call.query_BHTD, G) * call.scaling
        B, _, R, T, _ = query_BGRTD.shape
        segments = self._segments(call, pieces, R * T)
        block = max(1, BLOCK // (B * G * R * sum(segment.tokens for segment in segments)))
        outs = []
        for start in range(0, T, block):
            part = slice(start, min(T, start + block))
            query_BGND = query_BGRTD[:, :, :, part].flatten(2, 3)
            score_BGNS = call.softmax.capped(torch.cat([segment.dot(query_BGND) for segment in segments], -1))
            allowed = _joined([segment.allowed(call, part) for segment in segments], segments)
            if call.key_bias_BK is not None:
                number_BS = torch.cat([each.number(query_BGRTD.device) for each in segments], 1)
                number_BS = number_BS.clamp(max=call.key_bias_BK.shape[1] - 1)
                bias_BS = call.key_bias_BK.expand(B, -1).gather(1, number_BS).to(score_BGNS.dtype)
                score_BGNS = score_BGNS + bias_BS[:, None, None]
            if allowed is not None:
                # Queries of padding may attend to anything: a softmax over no column is NaN.
                allowed = allowed | ~allowed.any(-1, keepdim=True)
                score_BGRtS = score_BGNS.unflatten(2, (R, -1))
                score_BGNS = score_BGRtS.masked_fill(~allowed[:, None, None], -torch.inf).flatten(2, 3)
            weight_BGNS = call.softmax.weights(score_BGNS.unflatten(2, (R, -1))).flatten(2, 3)
            split = weight_BGNS.split([segment.tokens for segment in segments], -1)
            outs.append(sum(segment.mix(weight) for segment, weight in zip(segments, split, strict=True)))
        out_BGRTD = torch.cat([out.unflatten(2, (R, -1)) for out in outs], 3)
        return out_BGRTD.flatten(1, 2).transpose(1, 2).to(call.query_BHTD.dtype).contiguous()

    def _segments(
        self, call: AttentionCall, pieces: list[tuple[int, Tensor, Tensor]], queries: int
    ) -> list[CacheSection]:
        """All sections of the cache, without those that are empty in every row."""
        end, sinks, rows = call.start + call.tokens, self.method.sinks, range(self.batch())
        valid = [(0, min(sinks, max(0, end - pads))) for pads in self.pads]
        sections: list[CacheSection] = []
        if sinks:
            sections.append(DenseSection(list(self.pads), valid, self.sink_keys, self.sink_values))
        if any(self.coded):
            firsts, valid = [pads + sinks for pads in self.pads], [(0, coded) for coded in self.coded]
            coded = CodedSection(firsts, valid, self, self._position(0, max(self.coded)))
            sections.append(coded if queries <= min(c.queries for c in self.coders) else coded.dense())
        for first, keys, values in pieces:
            valid = [(max(0, self._exact_after(row) - first), keys.shape[2]) for row in rows]
            sections.append(DenseSection([first] * len(rows), valid, keys, values))
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

    def keep_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.keep_columns`; slots to remove must still be exact, unless all later slots go, too."""
        gone = (~keep_C).nonzero()
        first = int(gone[0]) if len(gone) else self.seen
        stays = keep_C[first:].nonzero()[:, 0]
        if len(stays) and first < self._exact_from():
            raise UserError(
                f"crop: {len(gone)} of the latest {self.seen - first} slots cannot be rolled back, because some are "
                "encoded; call cache.activate_past_recording() before tokens that may be rolled back"
            )
        rows = [each.index_select(2, stays) for each in self.ring.read(max(first, self.ring.first), self.ring.end)]
        self.hold = True
        self.rollback(first)
        for number in range(len(stays)):
            self.ring.append(*(each[:, :, number : number + 1] for each in rows))
        self._keep_sinks_of(first, *rows)
        self.seen = first + len(stays)
        self.hold = False
        self._settle()

    def rollback(self, tokens: int) -> None:
        """See `KVLayer.rollback`; encoded tokens stay encoded, so the exact window may be shorter for some steps."""
        coded = [min(c, max(0, tokens - p - self.method.sinks)) for c, p in zip(self.coded, self.pads, strict=True)]
        unit = max(codec.unit for codec in self.coders)
        if any(now != before and now % unit for now, before in zip(coded, self.coded, strict=True)):
            raise UserError(
                f"crop: the last {self.seen - tokens} of {self.seen} tokens cannot be rolled back, because tokens "
                f"that stay were coded together with them, {unit} at a time; call cache.activate_past_recording() "
                "before tokens that may be rolled back"
            )
        self.coded, self.seen = coded, tokens
        self.pads = [min(pads, tokens) for pads in self.pads]
        self.ring.truncate(tokens)
        for codes in self.codes:
            codes.truncate(max(coded))
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


@dataclass
class CacheSection:
    """Consecutive tokens of every batch row.

    Args:
        first: number of the first token, of each row.
        held: range of valid columns (start, stop), of each row.
    """

    first: list[int]
    held: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """S."""
        raise NotImplementedError

    def dot(self, query_BGND: Tensor) -> Tensor:
        """``[B, G, N, S]``: products of queries and keys."""
        raise NotImplementedError

    def mix(self, weight_BGNS: Tensor) -> Tensor:
        """``[B, G, N, D]``: weighted sums of the values."""
        raise NotImplementedError

    def number(self, device: torch.device) -> Tensor:
        """``[B, S]``: token numbers."""
        return torch.tensor(self.first, device=device)[:, None] + torch.arange(self.tokens, device=device)

    def within(self, device: torch.device) -> Tensor:
        """``[B, S]``: which columns are valid."""
        column_S = torch.arange(self.tokens, device=device)
        low_B1, high_B1 = torch.tensor(self.held, device=device)[..., None].unbind(1)
        return (column_S >= low_B1) & (column_S < high_B1)

    def allowed(self, call: AttentionCall, part: slice) -> Tensor | None:
        """``[B, t or 1, S]``: the columns that these queries of a call may attend to; `None`: all."""
        device = call.query_BHTD.device
        if call.mask_B1TK is None and call.tokens == 1:
            whole = all(held == (0, self.tokens) for held in self.held)
            return None if whole else self.within(device)[:, None]
        number_BS = self.number(device)
        if call.mask_B1TK is None:
            query_t = torch.arange(call.start + part.start, call.start + part.stop, device=device)
            visible_BtS = number_BS[:, None] <= query_t[:, None]
        else:
            rows_BtK = call.mask_B1TK[:, 0, part].expand(len(number_BS), -1, -1)
            at_BtS = number_BS.clamp(max=rows_BtK.shape[-1] - 1)[:, None].expand(-1, rows_BtK.shape[1], -1)
            visible_BtS = rows_BtK.gather(2, at_BtS)
        return visible_BtS & self.within(device)[:, None]


@dataclass
class DenseSection(CacheSection):
    """Tokens with exact keys and values, ``[B, G, S, D]``."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """S."""
        return self.keys.shape[2]

    def dot(self, query_BGND: Tensor) -> Tensor:
        """See `CacheSection.dot`."""
        return query_BGND.to(self.keys.dtype) @ self.keys.mT

    def mix(self, weight_BGNS: Tensor) -> Tensor:
        """See `CacheSection.mix`."""
        return weight_BGNS.to(self.values.dtype) @ self.values


@dataclass
class CodedSection(CacheSection):
    """Encoded tokens of a layer.

    Args:
        layer: the layer.
        position_BS: position ids of the tokens.
    """

    layer: SinkWindowLayer
    position_BS: Tensor

    @property
    def tokens(self) -> int:
        """S."""
        return self.position_BS.shape[1]

    def _of(self, which: int) -> tuple[Codec, Parts]:
        """Codec and codes of keys (0) or values (1)."""
        codec = self.layer.coders[which]
        return codec, self.layer.codes[which].view(codec)

    def dot(self, query_BGND: Tensor) -> Tensor:
        """See `CacheSection.dot`."""
        codec, parts = self._of(0)
        return codec.dot(query_BGND, parts, self.position_BS)

    def mix(self, weight_BGNS: Tensor) -> Tensor:
        """See `CacheSection.mix`."""
        codec, parts = self._of(1)
        return codec.mix(weight_BGNS, parts, self.position_BS)

    def dense(self) -> DenseSection:
        """The same tokens, decoded once, which is faster for many queries."""
        (keys, key_parts), (values, value_parts) = self._of(0), self._of(1)
        rows = keys.decode(key_parts, self.position_BS), values.decode(value_parts, self.position_BS)
        return DenseSection(self.first, self.held, *rows)


def _joined(allowed: list[Tensor | None], segments: list[CacheSection]) -> Tensor | None:
    """``[B, t or 1, S]`` of all sections together; `None`: all columns."""
    known = [each for each in allowed if each is not None]
    if not known:
        return None
    shape = known[0].shape[:2]
    filled = [
        known[0].new_ones(*shape, segment.tokens) if each is None else each
        for each, segment in zip(allowed, segments, strict=True)
    ]
    return torch.cat(filled, -1)

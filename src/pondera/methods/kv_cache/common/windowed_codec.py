"""A past in three regions: the first tokens exactly, the latest exactly, and what is between them as codes.

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
    """A memory that keeps the first tokens and the latest exactly, and codes of those between them.

    Attention of a call sees the new tokens exactly; after it, what no longer belongs to the latest is coded, and its
    exact rows are freed. Tokens are coded in batches of `flush_size`, counted from the first token of their text, so
    what is coded when depends on nothing but how long a text is: not on padding, on other texts, or on how it was fed
    in.

    What was coded stays coded: where tokens are taken back, codes are cut off, and the exact window is shorter until it
    has filled up again. With ``cache.activate_past_recording()`` nothing is coded before `crop` says which tokens stay,
    and nothing of those that go leaves a trace.

    Padding before a text takes no room. Padding within a text or behind it is never looked at, but takes room as a
    token. As keys are coded after rotary embedding, a padded row equals the row alone where it has the same position
    ids; that is what `generate` gives, while a plain call without ``position_ids`` counts padding.

    Args:
        window: the latest tokens, exact; up to ``window + flush_size - 1`` of them.
        sinks: the first tokens of a text, exact.
        flush_size: tokens that are coded at a time.
    """

    exact: bool = True
    """While nothing is coded, attention is by the stock kernel, so that nothing differs in the last bit."""

    def __init__(self, window: int, sinks: int, flush_size: int) -> None:
        super().__init__()
        for name, number, least in (("window", window, 0), ("sinks", sinks, 0), ("flush_size", flush_size, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UserError(f"{name}={number!r}: give a number of tokens, {least} or more")
        self.window, self.sinks, self.flush_size = window, sinks, flush_size

    @abstractmethod
    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """The coders of a layer's keys and values.

        Args:
            config: text config of the model.
            index: of the layer among the compressed ones.
        """

    @abstractmethod
    def rate(self, config: PreTrainedConfig) -> float:
        """Bits per cached number that really are kept of coded tokens, whatever was asked for.

        Args:
            config: text config of the model.
        """

    @property
    def needs_rows_of_config(self) -> bool:
        """See `KVCacheMethod.needs_rows_of_config`: coders are."""
        return True

    def layer(self, config: PreTrainedConfig, index: int, among: int) -> SinkWindowLayer:
        """See `KVCacheMethod.layer`."""
        return SinkWindowLayer(self, *self.coders(config, index))


class SinkWindowLayer(KVLayer):
    """One layer's past in three regions; what it does is told at `SinkWindowCache`.

    Args:
        method: says how long the regions are.
        keys, values: the coders.

    Attributes:
        pads: padding before each row's text.
        begins: the position id of each row's first token.
        coded: how many tokens of each row are codes.
        codes: of keys and of values, by number of the token among the coded ones.
        ring: the exact rows of the latest tokens, and of all that were seen while nothing is coded.
    """

    holds: ClassVar[tuple[str, ...]] = ("pads", "begins", "coded", "codes", "sink_keys", "sink_values", "ring")

    def __init__(self, method: SinkWindowCache, keys: Codec, values: Codec) -> None:
        super().__init__()
        self.method, self.coders = method, (keys, values)
        if odd := [coder.unit for coder in self.coders if method.flush_size % coder.unit]:
            raise UserError(
                f"flush_size={method.flush_size}: tokens are coded {odd[0]} together; give a multiple of {odd[0]}"
            )
        self.clear()

    def clear(self) -> None:
        """See `KVLayer.clear`."""
        self.pads: list[int] = []
        self.begins: list[int] = []
        self.coded: list[int] = []
        self.codes = (Codes(), Codes())
        self.sink_keys = self.sink_values = torch.empty(0)
        self.ring = RingBuffer(self.sink_keys, self.sink_values)

    def batch(self) -> int:
        """See `KVLayer.batch`."""
        return len(self.pads)

    # What a call does

    def attend(self, call: AttentionCall) -> Tensor:
        """See `KVLayer.attend`. Attends first to all that is there, the new tokens exactly, and codes then."""
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
        """Makes room for a batch."""
        B = len(call.key_BGTD)
        # A text begins where its padding ends; until then, that is where the call before this one ended.
        self.pads, self.begins, self.coded = [call.start] * B, [call.start] * B, [0] * B
        self.sink_keys, self.sink_values = (
            rows.new_zeros(B, rows.shape[1], self.method.sinks, rows.shape[-1])
            for rows in (call.key_BGTD, call.value_BGTD)
        )
        self.ring = RingBuffer(call.key_BGTD[:, :, :0], call.value_BGTD[:, :, :0])

    def _start_texts(self, call: AttentionCall) -> None:
        """Notes where texts begin whose first token is among the new ones."""
        waiting = [row for row, pads in enumerate(self.pads) if pads == call.start]
        if not waiting:
            return
        real_BT = (call.position_BT >= 0).cpu()
        ids = call.further.get("position_ids")
        for row in waiting:
            found = real_BT[row].nonzero()
            first = int(found[0]) if len(found) else call.tokens
            self.pads[row] = self.begins[row] = call.start + first
            if first == call.tokens:
                continue
            if ids is not None:
                self.begins[row] = int(ids.expand(len(self.pads), -1)[row, first])
            elif any(coder.needs_position for coder in self.coders):
                raise UserError(
                    f"{type(self.method).__name__}: this model does not tell its attention layers where tokens stand, which "
                    'key_stage="pre_rope" needs; use key_stage="post_rope"'
                )

    def _keep_sinks(self, call: AttentionCall) -> None:
        """Keeps those of the new tokens that are a text's first."""
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
        """The number of the first token of a row that is neither sink nor coded."""
        return self.pads[row] + self.method.sinks + self.coded[row]

    def _exact_from(self) -> int:
        """The first of all rows."""
        return min(self.ring.end, *map(self._exact_after, range(self.batch())))

    def _settle(self) -> None:
        """Codes what does not belong to the latest tokens any more, and frees its rows."""
        every, window, room = self.method.flush_size, self.method.window, self._room
        over = [self.ring.end - self._exact_after(row) - window for row in range(self.batch())]
        due = [max(0, tokens) // every * every for tokens in over]
        if any(due):
            for row, start, tokens in self._alike(due):
                self._code(row, start, tokens)
            self.coded = [coded + tokens for coded, tokens in zip(self.coded, due, strict=True)]
        self.ring.drop(self._exact_from() if any(self.coded) else self.ring.end - room + 1)
        if self.ring.borrowed or self.ring.room > room:
            # Rooms for short texts grow with them.
            self.ring.resize(room if any(self.coded) else min(room, len(self.ring) + max(16, len(self.ring) // 8)))

    @property
    def _room(self) -> int:
        """Exact tokens that there can be at most, and the one that comes."""
        return self.method.sinks + self.method.window + self.method.flush_size

    def _alike(self, due: list[int]) -> Iterator[tuple[slice, int, int]]:
        """Rows to be coded, in one go where all do the same; with the first token's number, and how many."""
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
        for coder, codes, x_BGSD in zip(self.coders, self.codes, rows, strict=True):
            parts = coder.encode(x_BGSD, position_BS)
            codes.write(coder, parts, row, self.coded[first], tokens, self.batch())

    def _position(self, start: int, tokens: int) -> Tensor:
        """``[B, S]``: position ids of coded tokens."""
        start += self.method.sinks
        if self.positions is not None:
            return self.positions[None, start : start + tokens]
        first_B = torch.tensor(self.begins, device=self.ring.keys.device)
        number_S = torch.arange(start, start + tokens, device=first_B.device)
        return first_B[:, None] + number_S.div(self.slots_per_token, rounding_mode="floor")

    # Attention over the regions

    def _by_segments(self, call: AttentionCall, pieces: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        """Softmax attention over all regions together."""
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
                # A query of padding sees anything: a softmax over nothing would be NaN.
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
        """What is kept, as segments without what is in none of the rows."""
        end, sinks, rows = call.start + call.tokens, self.method.sinks, range(self.batch())
        held = [(0, min(sinks, max(0, end - pads))) for pads in self.pads]
        found: list[CacheSection] = []
        if sinks:
            found.append(DenseSection(list(self.pads), held, self.sink_keys, self.sink_values))
        if any(self.coded):
            firsts, held = [pads + sinks for pads in self.pads], [(0, coded) for coded in self.coded]
            coded = CodedSection(firsts, held, self, self._position(0, max(self.coded)))
            found.append(coded if queries <= min(c.queries for c in self.coders) else coded.dense())
        for first, keys, values in pieces:
            held = [(max(0, self._exact_after(row) - first), keys.shape[2]) for row in rows]
            found.append(DenseSection([first] * len(rows), held, keys, values))
        return found

    def restored(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is kept, decoded, in no particular order: keys and values ``[B, G, S, D]``, and their token numbers
        ``[B, S]``, negative where a row holds nothing."""
        pieces = list(self.ring.pieces(self._exact_from(), self.ring.end))
        none_BG0D = self.ring.keys[:, :, :0]
        call = AttentionCall(torch.nn.Module(), none_BG0D, none_BG0D, none_BG0D, None, 1.0, self.seen)
        dense = [part.dense() if isinstance(part, CodedSection) else part for part in self._segments(call, pieces, 0)]
        keys, values = (torch.cat([getattr(part, name) for part in dense], 2) for name in ("keys", "values"))
        numbers = [torch.where(part.within(keys.device), part.number(keys.device), -1) for part in dense]
        return keys, values, torch.cat(numbers, 1)

    # What caches do

    def release(self, prompt: bool) -> None:
        """See `KVLayer.release`."""
        held = self.hold
        super().release(prompt)
        if held and self.batch() and not self.record_past:
            self._settle()

    def keep_columns(self, keep_C: Tensor) -> None:
        """See `KVLayer.keep_columns`; the slots that go must be exact still, unless all that follow them go, too."""
        gone = (~keep_C).nonzero()
        first = int(gone[0]) if len(gone) else self.seen
        stays = keep_C[first:].nonzero()[:, 0]
        if len(stays) and first < self._exact_from():
            raise UserError(
                f"crop: {len(gone)} of the latest {self.seen - first} slots are to be taken back, and some of them were coded "
                "already; call cache.activate_past_recording() before tokens that may be drafts"
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
        """See `KVLayer.rollback`; what was coded stays coded, and the exact window may be shorter for a while."""
        coded = [min(c, max(0, tokens - p - self.method.sinks)) for c, p in zip(self.coded, self.pads, strict=True)]
        unit = max(coder.unit for coder in self.coders)
        if any(now != before and now % unit for now, before in zip(coded, self.coded, strict=True)):
            raise UserError(
                f"crop: the last {self.seen - tokens} of {self.seen} tokens are to be taken back, and some of those that "
                f"stay were coded together with them, {unit} at a time; call cache.activate_past_recording() before tokens "
                "that may be drafts"
            )
        self.coded, self.seen = coded, tokens
        self.pads = [min(pads, tokens) for pads in self.pads]
        self.ring.crop(tokens)
        for codes in self.codes:
            codes.crop(max(coded))
        if not self.hold:
            self._settle()

    def select(self, rows: Tensor) -> None:
        """See `KVLayer.select`."""
        chosen = rows.tolist()
        self.pads, self.begins, self.coded = (
            [each[row] for row in chosen] for each in (self.pads, self.begins, self.coded)
        )
        self.sink_keys, self.sink_values = (kept[rows.to(kept.device)] for kept in (self.sink_keys, self.sink_values))
        self.ring.select(rows)
        for codes in self.codes:
            codes.select(rows)
            codes.crop(max(self.coded))

    def nbytes(self) -> int:
        """See `KVLayer.nbytes`; codebooks belong to the memory, and are not counted here."""
        exact = [self.sink_keys, self.sink_values, self.ring.keys, self.ring.values]
        codes = [part for codes in self.codes for part in codes.parts.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in (*exact, *codes))

    def code_bytes(self) -> int:
        """Bytes of the codes in use, without spare room and without what is exact."""
        return sum(codes.live_bytes(coder) for codes, coder in zip(self.codes, self.coders, strict=True))


@dataclass
class CacheSection:
    """Consecutive tokens of every row.

    Args:
        first: the number of the first of them, of each row.
        held: which columns count, of each row: from, to before.
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
        """``[B, G, N, D]``: values, weighed and summed."""
        raise NotImplementedError

    def number(self, device: torch.device) -> Tensor:
        """``[B, S]``: numbers of tokens."""
        return torch.tensor(self.first, device=device)[:, None] + torch.arange(self.tokens, device=device)

    def within(self, device: torch.device) -> Tensor:
        """``[B, S]``: which columns count."""
        column_S = torch.arange(self.tokens, device=device)
        low_B1, high_B1 = torch.tensor(self.held, device=device)[..., None].unbind(1)
        return (column_S >= low_B1) & (column_S < high_B1)

    def allowed(self, call: AttentionCall, part: slice) -> Tensor | None:
        """``[B, t or 1, S]``: which columns some of a call's queries may look at; none: all."""
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
    """Tokens whose rows are there, ``[B, G, S, D]``."""

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
    """Tokens that are codes of a layer.

    Args:
        layer: theirs.
        position_BS: their position ids.
    """

    layer: SinkWindowLayer
    position_BS: Tensor

    @property
    def tokens(self) -> int:
        """S."""
        return self.position_BS.shape[1]

    def _of(self, which: int) -> tuple[Codec, Parts]:
        """Coder and codes of keys (0) or values (1)."""
        coder = self.layer.coders[which]
        return coder, self.layer.codes[which].view(coder)

    def dot(self, query_BGND: Tensor) -> Tensor:
        """See `CacheSection.dot`."""
        coder, parts = self._of(0)
        return coder.dot(query_BGND, parts, self.position_BS)

    def mix(self, weight_BGNS: Tensor) -> Tensor:
        """See `CacheSection.mix`."""
        coder, parts = self._of(1)
        return coder.mix(weight_BGNS, parts, self.position_BS)

    def dense(self) -> DenseSection:
        """The same with its rows decoded once, for many queries."""
        (keys, key_parts), (values, value_parts) = self._of(0), self._of(1)
        rows = keys.decode(key_parts, self.position_BS), values.decode(value_parts, self.position_BS)
        return DenseSection(self.first, self.held, *rows)


def _joined(allowed: list[Tensor | None], segments: list[CacheSection]) -> Tensor | None:
    """``[B, t or 1, S]`` of all segments together; none: all of them."""
    known = [each for each in allowed if each is not None]
    if not known:
        return None
    shape = known[0].shape[:2]
    filled = [
        known[0].new_ones(*shape, segment.tokens) if each is None else each
        for each, segment in zip(allowed, segments, strict=True)
    ]
    return torch.cat(filled, -1)

"""Sections of a cache, exact or encoded, and attention over several of them together.

Shapes: B batch, G KV heads, R query heads per KV head, T new tokens, t queries of a block, N = R * t, S tokens of a
section, K tokens seen and new, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Codes, Parts
from pondera.cache.layer import AttentionCall
from pondera.cache.slot_attention import BLOCK, grouped


@dataclass
class CacheSection:
    """Consecutive tokens of every batch row.

    Args:
        first: number of the first token, of each row.
        held: range of valid columns (start, stop), of each row.
    """

    first: list[int]
    held: list[tuple[int, int]]

    @cached_property
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
            whole = [(0, self.tokens)] * len(self.held)
            return None if self.held == whole else self.within(device)[:, None]
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

    @cached_property
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
        codecs: of keys and of values.
        codes: of keys and of values.
        position_BS: position ids of the tokens.
    """

    codecs: tuple[Codec, Codec]
    codes: tuple[Codes, Codes]
    position_BS: Tensor

    @cached_property
    def tokens(self) -> int:
        """S."""
        return self.position_BS.shape[1]

    def _of(self, which: int) -> tuple[Codec, Parts]:
        """Codec and codes of keys (0) or values (1)."""
        codec = self.codecs[which]
        return codec, self.codes[which].view(codec)

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


def attend_to_sections(call: AttentionCall, sections: list[CacheSection]) -> Tensor:
    """Softmax attention over all sections together, ``[B, T, H, D]``."""
    G = call.key_BGTD.shape[1]
    query_BGRTD = grouped(call.query_BHTD, G) * call.scaling
    B, _, R, T, _ = query_BGRTD.shape
    widths = [section.tokens for section in sections]
    block = max(1, BLOCK // (B * G * R * sum(widths)))
    outs = []
    for start in range(0, T, block):
        part = slice(start, min(T, start + block))
        query_BGND = query_BGRTD[:, :, :, part].flatten(2, 3)
        score_BGNS = call.softmax.capped(torch.cat([section.dot(query_BGND) for section in sections], -1))
        allowed = _joined([section.allowed(call, part) for section in sections], sections)
        if call.key_bias_BK is not None:
            number_BS = torch.cat([each.number(query_BGRTD.device) for each in sections], 1)
            number_BS = number_BS.clamp(max=call.key_bias_BK.shape[1] - 1)
            bias_BS = call.key_bias_BK.expand(B, -1).gather(1, number_BS).to(score_BGNS.dtype)
            score_BGNS = score_BGNS + bias_BS[:, None, None]
        if allowed is not None:
            # Queries of padding may attend to anything: a softmax over no column is NaN.
            allowed = allowed | ~allowed.any(-1, keepdim=True)
            score_BGRtS = score_BGNS.unflatten(2, (R, -1))
            score_BGNS = score_BGRtS.masked_fill(~allowed[:, None, None], -torch.inf).flatten(2, 3)
        weight_BGNS = call.softmax.weights(score_BGNS.unflatten(2, (R, -1))).flatten(2, 3)
        split = weight_BGNS.split(widths, -1)
        outs.append(sum([section.mix(weight) for section, weight in zip(sections, split, strict=True)]))
    out_BGRTD = torch.cat([out.unflatten(2, (R, -1)) for out in outs], 3)
    return out_BGRTD.flatten(1, 2).transpose(1, 2).to(call.query_BHTD.dtype).contiguous()


def _joined(allowed: list[Tensor | None], sections: list[CacheSection]) -> Tensor | None:
    """``[B, t or 1, S]`` of all sections together; `None`: all columns."""
    known = [each for each in allowed if each is not None]
    if not known:
        return None
    shape = known[0].shape[:2]
    filled = [
        known[0].new_ones(*shape, section.tokens) if each is None else each
        for each, section in zip(allowed, sections, strict=True)
    ]
    return torch.cat(filled, -1)

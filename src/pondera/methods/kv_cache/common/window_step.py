"""One token of a cache layer with sinks, codes and an exact window, in one native call.

The reference implementation is the rest of `SinkWindowLayer.attend`. Between two encodings only the window changes, by one
token per step, so the arguments of the call are prepared once, and a step changes a few numbers.

Shapes: B batch, G KV heads, T new tokens, K tokens seen and new, D head width.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pondera.cache.layer import AttentionCall
from pondera.cache.native_sections import NativeSection, SectionsCall, dense_rows
from pondera.cache.slot_attention import PLAIN
from pondera.kernels.build import library
from pondera.kernels.call import fit_rows

if TYPE_CHECKING:
    from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer


class WindowStep:
    """The prepared call of a layer.

    Args:
        layer: has encoded tokens, and room for one more in its ring.
        call: a call of one token; its shapes and strides are those of later calls.
        codes: the encoded tokens.
    """

    def __init__(self, layer: SinkWindowLayer, call: AttentionCall, codes: NativeSection) -> None:
        B, H, _, D = call.query_BHTD.shape
        G = call.key_BGTD.shape[1]
        self.state, self.tensors = _numbers(layer), _tensors(layer)
        self.after = layer.exact_after()
        self.exact_from = min(self.after)
        ring, nobody = layer.ring, [(0, 0)] * B
        pieces = [(ring.keys, ring.values, 0, nobody)] * 2
        if layer.method.sinks:
            pieces.append((layer.sink_keys, layer.sink_values, layer.method.sinks, [(0, layer.method.sinks)] * B))
        sections = [codes]
        for keys, values, tokens, held in pieces:
            key_rows, value_rows = dense_rows(keys), dense_rows(values)
            assert key_rows is not None and value_rows is not None
            sections.append(NativeSection(key_rows, value_rows, tokens, held))
        self.call = SectionsCall(sections, (B, G, H // G, D), call.value_BGTD.shape[3], call.scaling)
        self.scaling = call.scaling
        self.numbers = [(ctypes.c_int64 * B)() for _ in sections]  # the column of the first token in a mask
        for section, number in zip(self.call.given, self.numbers, strict=True):
            section.number = ctypes.addressof(number)
        self.numbers[0][:] = [pads + layer.method.sinks for pads in layer.pads]
        if layer.method.sinks:
            self.numbers[3][:] = layer.pads
        self.stores = []
        for new, rows, name in ((call.key_BGTD, ring.keys, "key"), (call.value_BGTD, ring.values, "value")):
            argument, step = getattr(self.call.arguments, name), 4 * rows.stride(2)
            argument.from_B, argument.from_G = new.stride()[:2]
            argument.to_B, argument.to_G = rows.stride()[:2]
            given = [getattr(self.call.given[piece], name + "s") for piece in (1, 2)]
            self.stores.append((argument, rows.data_ptr(), step, given))
        self.strides = (call.query_BHTD.shape, call.key_BGTD.stride(), call.value_BGTD.stride())

    @classmethod
    def of(cls, layer: SinkWindowLayer, call: AttentionCall) -> Self | None:
        """The call of a layer; `None` if no kernel supports its state."""
        ring, rows = layer.ring, (call.query_BHTD, call.key_BGTD, call.value_BGTD)
        if (
            not fit_rows(*rows, ring.keys, ring.values, layer.sink_keys, layer.sink_values)
            or library("sections") is None
        ):
            return None
        codes = layer.native_codes()
        return None if codes is None else cls(layer, call, codes)

    def fits(self, layer: SinkWindowLayer, call: AttentionCall) -> bool:
        """Whether the layer and the call are still those of the preparation."""
        rows = (call.query_BHTD, call.key_BGTD, call.value_BGTD)
        return (
            self.state == _numbers(layer)
            and all(one is other for one, other in zip(self.tensors, _tensors(layer), strict=True))
            and self.strides == (rows[0].shape, rows[1].stride(), rows[2].stride())
            and self.scaling == call.scaling
            and fit_rows(*rows, layer.ring.keys)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a layer prepares its own."""

    def __call__(self, layer: SinkWindowLayer, call: AttentionCall) -> Tensor | None:
        """Stores the new token and attends to all; `None`, and nothing is stored, if there is no kernel."""
        ring, first = layer.ring, self.exact_from
        room, end = ring.room, ring.end + 1
        at, new = (first - ring.origin) % room, (ring.end - ring.origin) % room
        counts = min(end - first, room - at), max(0, end - first - room + at)
        arguments = self.call.arguments
        for given, (argument, start, step, pieces) in zip((call.key_BGTD, call.value_BGTD), self.stores, strict=True):
            argument.source, argument.target = given.data_ptr(), start + new * step
            pieces[0].data, pieces[1].data = start + at * step, start
        for piece, begin, count in ((1, first, counts[0]), (2, first + counts[0], counts[1])):
            self.call.given[piece].tokens = count
            self.call.held[piece][:] = [edge for after in self.after for edge in (max(0, after - begin), count)]
            self.numbers[piece][:] = [begin] * len(self.after)
        mask = call.mask_B1TK
        arguments.mask = None if mask is None else mask.data_ptr()
        if mask is not None:
            arguments.mask_B, arguments.mask_K = (0 if len(mask) == 1 else mask.stride(0)), mask.stride(3)
        out_B1HD = self.call(call.query_BHTD)
        if out_B1HD is not None:
            ring.end = end
        return out_B1HD


def supports(call: AttentionCall) -> bool:
    """Whether a step in one native call may compute this call."""
    return (
        call.query_BHTD.shape[2] == 1
        and call.key_bias_BK is None
        and call.softmax is PLAIN
        and (call.mask_B1TK is None or call.mask_B1TK.device.type == "cpu")
        and not torch.compiler.is_compiling()
    )


def _numbers(layer: SinkWindowLayer) -> tuple[Any, ...]:
    """What a preparation depends on, apart from tensors."""
    ring = layer.ring
    rows = (tuple(layer.coded), tuple(layer.pads), tuple(layer.begins))
    return (ring.first, ring.origin, layer.slots_per_token, *rows)


def _tensors(layer: SinkWindowLayer) -> list[Any]:
    """The tensors that a preparation points to; others take their place whenever their storage changes."""
    ring, (keys, values) = layer.ring, layer.codes
    return [
        ring.keys,
        ring.values,
        layer.sink_keys,
        layer.sink_values,
        layer.positions,
        *keys.parts.values(),
        *values.parts.values(),
    ]

"""Uniform quantization to a few bits, with minimum and step per group of numbers.

Shapes: B batch, G KV heads, S tokens, D head width, N queries, g numbers that share a step, b bits of a number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Parts
from pondera.cache.native_sections import UNIFORM, Rows
from pondera.core.errors import UserError
from pondera.kernels.build import library
from pondera.methods.kv_cache.common.bit_packing import pack_bits, unpack_bits

BITS = (1, 2, 4, 8)
WIDEST = 1024
"""The widest head of the kernel."""
DECODE, DOT, MIX = range(3)
"""What the kernel computes."""


class _Uniform(ctypes.Structure):
    """The struct of ``uniform.c``; the kernel sets its last two fields."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "least", "step", "given", "out")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("codes", "least", "step") for axis in "BG"),
        *(
            (name, ctypes.c_int64)
            for name in ("B", "G", "S", "D", "N", "bits", "group", "by_channel", "block", "mode", "threads")
        ),
        ("sums", ctypes.c_void_p),
        ("blocks", ctypes.c_long),
    )


class UniformQuantizer(Codec):
    """Rounds every number to one of ``2 ** bits`` levels between the minimum and the maximum of its group.

    The codec packs codes along the head width: ``codes``, ``[B, G, S, D * bits / 8]``, uint8, the first number in the
    lowest bits. ``least`` and ``step`` are float16: per channel over `group` tokens, ``[B, G, S / g, D]``, or per token
    over `group` channels, ``[B, G, S, D / g]``.

    Args:
        bits: 1, 2, 4 or 8.
        group: g.
        by_channel: whether a group is one channel of consecutive tokens, or consecutive channels of one token.

    Example:
        >>> codec = UniformQuantizer(bits=2, group=4, by_channel=False)
        >>> parts = codec.encode(torch.tensor([[[[0.0, 1.0, 2.2, 3.0]]]]), None)
        >>> parts["codes"].tolist(), codec.decode(parts, None).tolist()
        ([[[[228]]]], [[[[0.0, 1.0, 2.0, 3.0]]]])
    """

    alike: bool = True
    queries: int = 16

    def __init__(self, bits: int, group: int, by_channel: bool) -> None:
        self.bits, self.group, self.by_channel = bits, group, by_channel
        self.unit = group if by_channel else 1

    def entry(self, name: str) -> int:
        """See `Codec.entry`."""
        return 1 if name == "codes" else self.unit

    def encode(self, x_BGSD: Tensor, position_BS: Tensor | None = None) -> Parts:
        """See `Codec.encode`."""
        x = self._in_groups(x_BGSD.to(torch.promote_types(x_BGSD.dtype, torch.float32)))
        axis = 3 if self.by_channel else 4
        least, most = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        # Rounded to float16 first, because decoding uses the stored minimum and step.
        least, step = least.half(), ((most - least) / (2**self.bits - 1)).half()
        levels = ((x - least) / step.float().clamp(min=1e-7)).round().clamp(0, 2**self.bits - 1)
        codes = pack_bits(levels.to(torch.uint8).view(x_BGSD.shape), self.bits)
        return {"codes": codes, "least": least.squeeze(axis), "step": step.squeeze(axis)}

    def decode(self, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.decode`; on a CPU with a native kernel."""
        B, G, S, _ = parts["codes"].shape
        width = parts["codes"].shape[-1] * 8 // self.bits
        out_BGSD = self._native(DECODE, parts, None, (B, G, S, width))
        return self.decoded(parts) if out_BGSD is None else out_BGSD

    def dot(self, query_BGND: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.dot`: the kernel decodes a token at a time."""
        B, G, N, _ = query_BGND.shape
        out_BGNS = self._native(DOT, parts, query_BGND, (B, G, N, parts["codes"].shape[2]))
        return super().dot(query_BGND, parts, position_BS) if out_BGNS is None else out_BGNS

    def mix(self, weight_BGNS: Tensor, parts: Parts, position_BS: Tensor | None = None) -> Tensor:
        """See `Codec.mix`."""
        B, G, N, _ = weight_BGNS.shape
        out_BGND = self._native(MIX, parts, weight_BGNS, (B, G, N, parts["codes"].shape[-1] * 8 // self.bits))
        return super().mix(weight_BGNS, parts, position_BS) if out_BGND is None else out_BGND

    def kernel_rows(self, parts: Parts, first: Sequence[int] | None = None, keys: bool = False) -> Rows | None:
        """See `Codec.kernel_rows`."""
        codes, least, step = parts["codes"], parts["least"], parts["step"]
        if not _readable(codes, least, step) or codes.shape[-1] * 8 // self.bits > WIDEST:
            return None
        return Rows(
            UNIFORM,
            *(codes.data_ptr(), least.data_ptr(), step.data_ptr()),
            *(*codes.stride()[:3], *least.stride()[:2], *step.stride()[:2]),
            *(self.bits, self.group, self.by_channel),
        )

    def _native(self, mode: int, parts: Parts, given: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """The result of the kernel; `None` if it does not support the arguments."""
        codes, least, step = parts["codes"], parts["least"], parts["step"]
        B, G, S, width = *codes.shape[:3], codes.shape[3] * 8 // self.bits
        rows = (codes, least, step)
        if not S or not _readable(*rows) or width > WIDEST or torch.compiler.is_compiling():
            return None
        if given is not None and (given.device.type != "cpu" or (torch.is_grad_enabled() and given.requires_grad)):
            return None
        if given is not None and given.dtype == torch.float64:
            return None
        kernel = library("uniform")
        if kernel is None:
            return None
        if given is not None:
            given = given.float().contiguous()
        out = torch.empty(shape)
        strides = (number for part in rows for number in (part.stride(0), part.stride(1)))
        pointers = (*(part.data_ptr() for part in rows), None if given is None else given.data_ptr(), out.data_ptr())
        N = 0 if given is None else given.shape[2]
        sizes = (B, G, S, width, N, self.bits, self.group, self.by_channel, 0, mode, torch.get_num_threads())
        if kernel.uniform(ctypes.byref(_Uniform(*pointers, *strides, *sizes))):
            raise MemoryError("the native kernel 'uniform' could not allocate memory")
        return out

    def decoded(self, parts: Parts) -> Tensor:
        """`decode` with operations of torch: the reference implementation."""
        axis = 3 if self.by_channel else 4
        levels = self._in_groups(unpack_bits(parts["codes"], self.bits).float())
        x = torch.addcmul(parts["least"].float().unsqueeze(axis), levels, parts["step"].float().unsqueeze(axis))
        return x.flatten(2, 3) if self.by_channel else x.flatten(3, 4)

    def _in_groups(self, x_BGSD: Tensor) -> Tensor:
        return x_BGSD.unflatten(2, (-1, self.group)) if self.by_channel else x_BGSD.unflatten(3, (-1, self.group))


def _readable(*rows_BGSX: Tensor) -> bool:
    """Whether the kernel can read these: on the CPU, the rows of a head one after another."""
    return all(
        type(rows) is Tensor
        and rows.device.type == "cpu"
        and rows.stride(-1) == 1
        and (rows.shape[2] == 1 or rows.stride(2) == rows.shape[3])
        for rows in rows_BGSX
    )


def check_bits(bits: int, width: int) -> None:
    """Raises if the codes of a head do not fill whole bytes.

    Args:
        bits: of a number.
        width: D.
    """
    if width * bits % 8:
        raise UserError(
            f"bits={bits}: a head of width {width} does not fill whole bytes; give more bits, 8 fits any head"
        )

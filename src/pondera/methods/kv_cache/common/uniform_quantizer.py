"""Uniform quantization to a few bits, with minimum and step per group of numbers.

Shapes: B batch, G KV heads, S tokens, D head width, g numbers that share a step, b bits of a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pondera.cache.codec import Codec, Parts
from pondera.core.errors import UserError
from pondera.methods.kv_cache.common.bit_packing import pack_bits, unpack_bits

BITS = (1, 2, 4, 8)


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
        """See `Codec.decode`."""
        axis = 3 if self.by_channel else 4
        levels = self._in_groups(unpack_bits(parts["codes"], self.bits).float())
        x = torch.addcmul(parts["least"].float().unsqueeze(axis), levels, parts["step"].float().unsqueeze(axis))
        return x.flatten(2, 3) if self.by_channel else x.flatten(3, 4)

    def _in_groups(self, x_BGSD: Tensor) -> Tensor:
        return x_BGSD.unflatten(2, (-1, self.group)) if self.by_channel else x_BGSD.unflatten(3, (-1, self.group))


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

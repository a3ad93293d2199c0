"""TurboQuant: codes of randomly rotated keys and values, without calibration.

Shapes: D head width.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.cache.codec import Codec
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.common.rotated_quantizer import RotatedQuantizer, random_rotation
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache

BITS = (1, 2, 3, 4)


class TurboQuant(SinkWindowCache):
    """Rounds the coordinates of randomly rotated keys and values to the levels that are best for random directions.

    A vector is its norm, in float16, and a direction. After a random rotation, each coordinate of any direction has the
    same known distribution, so one table of ``2 ** bits`` levels (Lloyd-Max) fits all layers, heads and channels without
    calibration. The mean squared error is 0.36, 0.117, 0.03 and 0.009 of the squared norm at 1 to 4 bits. With
    `inner_product`, keys get one bit less and the signs of the rounding error times a random matrix (QJL): products with
    queries are then right on average, and vary more.

    Source: Zandieh et al., TurboQuant, arXiv 2504.19874: Q_mse and, with `inner_product`, Q_prod for keys.
    Cost: ``bits + 16 / D`` bits per number (`rate`), and another 16 / D for keys with `inner_product`; D * D numbers once
    per model for the rotation. A decode step looks all earlier tokens up, and rotates queries and sums.
    When not to use it: where `KIVI` is affordable for keys with few large channels, which the rotation spreads over all
    coordinates; with `inner_product`, if rare large errors of scores hurt more than a small bias.
    Resolved: the paper gives more bits to channels with large numbers to reach 2.5 and 3.5 bits; that is left out. Levels
    are those of the exact distribution at width D, not of its limit. The matrix of the signs has D columns. Keys are coded
    after rotary embedding. Unlike in the paper, first and latest tokens stay exact.

    Args:
        bits: of a coordinate: 1, 2, 3 or 4; with `inner_product` one of them is the sign, for keys.
        inner_product: whether products of keys and queries are unbiased.
        window: number of latest tokens that stay exact; up to ``window + flush_size - 1`` of them do.
        sinks: number of first tokens that stay exact.
        flush_size: number of tokens that the cache encodes at a time.
        seed: seed of the random matrices.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
        >>> TurboQuant(bits=3).rate(config), TurboQuant(bits=3).token_bytes(config)
        (3.125, 800.0)
    """

    paper: ClassVar[str] = "TurboQuant, arXiv 2504.19874"
    cost: ClassVar[str] = "bits + 16 / D per number, plus the exact window; each step looks all earlier tokens up"
    examples: ClassVar[dict[str, str]] = {
        "exact": "TurboQuant()",
        "tight": "TurboQuant(2, window=5, sinks=1, flush_size=2)",
        "exact-product": "TurboQuant(3, inner_product=True)",
        "tight-product": "TurboQuant(3, inner_product=True, window=4, sinks=1, flush_size=3)",
    }

    def __init__(
        self,
        bits: int = 4,
        inner_product: bool = False,
        window: int = 128,
        sinks: int = 4,
        flush_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(window, sinks, flush_size)
        if isinstance(bits, bool) or bits not in BITS:
            raise UserError(f"bits={bits!r}: give {', '.join(map(str, BITS))}")
        self.bits, self.inner_product, self.seed = bits, inner_product, seed
        self._codecs: dict[int, tuple[Codec, Codec]] = {}

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        if head_dim(config) % 8:
            raise UserError(
                f"TurboQuant: heads of width {head_dim(config)} do not fill whole bytes; it supports multiples of 8; "
                "use KIVI(8)"
            )

    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """See `SinkWindowCache.coders`; all layers share them."""
        D = head_dim(config)
        if D not in self._codecs:
            rotation_DD = random_rotation(D, self.seed)
            keys = values = RotatedQuantizer(self.bits, rotation_DD)
            if self.inner_product:
                sketch_DD = torch.randn(D, D, generator=torch.Generator().manual_seed(self.seed + 1))
                keys = RotatedQuantizer(self.bits - 1, rotation_DD, sketch_DD)
            self._codecs[D] = keys, values
        return self._codecs[D]

    def token_bytes(self, config: PreTrainedConfig) -> float:
        """Bytes of one encoded token in one layer, with its norms."""
        return self.rate(config) * 2 * kv_heads(config) * head_dim(config) / 8

    def rate(self, config: PreTrainedConfig) -> float:
        """See `SinkWindowCache.rate`."""
        norms = 3 if self.inner_product else 2  # of key and value, and of the rounding error of the key
        return self.bits + norms * 16 / (2 * head_dim(config))

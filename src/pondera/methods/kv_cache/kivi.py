"""KIVI: uniform quantization, keys per channel and values per token.

Shapes: D head width.
"""

from __future__ import annotations

from typing import ClassVar

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.cache.codec import Codec
from pondera.core.errors import UserError, unknown
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.common.uniform_quantizer import BITS, UniformQuantizer, check_bits
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache

KEYS = ("channel", "token")


class KIVI(SinkWindowCache):
    """Uniform quantization of the KV cache to a few bits, keys per channel and values per token.

    The latest tokens stay exact. A few channels of keys are large in every token. Therefore keys share minimum and step
    within a channel, over neighboring tokens; values share them within a token, over neighboring channels. The method
    needs no calibration.

    Source: Liu et al., KIVI, arXiv 2402.02750: asymmetric, 2 bits, groups of 32.
    Cost: the bits, and two float16 numbers per group: ``bits + 32 / group`` bits per number (`rate`), 3 for 2 bits in
    groups of 32. A decode step dequantizes all earlier tokens; there is no arithmetic on codes.
    When not to use it: for 2 bits per number in total, which leave 1 bit for the codes; use `VQKV` there.
    With 2 bits check the quality on your model: SmolLM2-135M lost 12 to 25 % of what its contexts are worth, and 1 to
    2 % with 4 bits, which are the default for that reason.
    Resolved: the paper has 2 bits, and quantizes keys when a window of exact ones is full, and values one by one; here
    the method quantizes both `group` tokens at a time, so the exact window has `window` to ``window + group - 1``
    tokens. The paper quantizes the first tokens, too (``sinks=0``); here they stay exact by default, because every
    later token attends to them. Steps and minima are float16.

    Args:
        bits: 1, 2, 4 or 8 per number.
        group: number of values that share a step; for values at most the head width.
        window: number of latest tokens that stay exact; up to ``window + group - 1`` of them do.
        sinks: number of first tokens that stay exact; the paper has none.
        keys: ``"channel"``, or ``"token"`` to quantize keys in the way of values (a control).

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
        >>> KIVI(bits=2).rate(config), KIVI(bits=2).token_bytes(config)
        (3.0, 768.0)
    """

    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
    cost: ClassVar[str] = (
        "bits + 32 / group per number, plus the exact window; each step dequantizes all earlier tokens"
    )
    examples: ClassVar[dict[str, str]] = {"exact": "KIVI()", "tight": "KIVI(2, group=4, window=4, sinks=1)"}

    def __init__(
        self, bits: int = 4, group: int = 32, window: int = 128, sinks: int = 4, keys: str = "channel"
    ) -> None:
        if bits not in BITS:
            raise UserError(f"bits={bits!r}: give {', '.join(map(str, BITS))}")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise UserError(f"group={group!r}: give how many numbers share a step, 1 or more; the paper uses 32")
        if keys not in KEYS:
            raise unknown("keys", keys, KEYS)
        super().__init__(window, sinks, flush_size=group)
        self.bits, self.group, self.keys = bits, group, keys

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`."""
        width = head_dim(config)
        check_bits(self.bits, width)
        if width % min(self.group, width):
            raise UserError(f"group={self.group}: it does not divide heads of width {width}; give a divisor of {width}")

    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """See `SinkWindowCache.coders`."""
        values = UniformQuantizer(self.bits, min(self.group, head_dim(config)), by_channel=False)
        return UniformQuantizer(self.bits, self.group, by_channel=True) if self.keys == "channel" else values, values

    def token_bytes(self, config: PreTrainedConfig) -> float:
        """Bytes of one quantized token in one layer, with its part of the steps that tokens share."""
        return self.rate(config) * 2 * kv_heads(config) * head_dim(config) / 8

    def rate(self, config: PreTrainedConfig) -> float:
        """See `SinkWindowCache.rate`."""
        of_values = self.bits + 32 / min(self.group, head_dim(config))
        of_keys = self.bits + 32 / self.group if self.keys == "channel" else of_values
        return (of_keys + of_values) / 2

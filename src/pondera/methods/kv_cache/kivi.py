"""KIVI: keys rounded by channel, values rounded by token.

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
    """Keeps the latest tokens exactly, and of the others every number in a few bits, packed.

    A few channels of keys are large in every token, so keys share a least number and a step with the same channel of
    neighbouring tokens; values share theirs with neighbouring channels of the same token. Nothing has to be fitted.

    Source: Liu et al., KIVI, arXiv 2402.02750: asymmetric, 2 bits, groups of 32.
    Cost: bits and two float16 per group, so ``bits + 32 / group`` bits per number (`rate`): 3 for 2 bits in groups of 32. A
    step decodes all of the past; there is no arithmetic on codes here.
    When not to use it: at 2 bits per number in all, which leaves 1 for the codes; `VQKV` is made for that.
    Resolved: the paper rounds keys when a window of exact ones has filled up, and values one by one; here both are rounded
    `group` tokens at a time, so the exact window holds `window` to ``window + group - 1`` tokens. It keeps no first tokens
    exactly, and nor does this unless `sinks` says so. Steps and least numbers are float16.

    Args:
        bits: 1, 2, 4 or 8 per number.
        group: numbers that share a step; of a head that is narrower, its width for values.
        window: the latest tokens, exact; see `SinkWindowCache`.
        sinks: the first tokens, exact.
        keys: ``"channel"``; or ``"token"``, rounded as values are (a control).

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
        >>> KIVI(bits=2).rate(config), KIVI(bits=2).token_bytes(config)
        (3.0, 768.0)
    """

    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
    cost: ClassVar[str] = "bits + 32 / group per number, window beside; all of the past is decoded in every step"
    examples: ClassVar[dict[str, str]] = {"exact": "KIVI()", "tight": "KIVI(2, group=4, window=4, sinks=1)"}

    def __init__(
        self, bits: int = 2, group: int = 32, window: int = 128, sinks: int = 0, keys: str = "channel"
    ) -> None:
        if bits not in BITS:
            raise UserError(f"bits={bits!r}: give {', '.join(map(str, BITS))}")
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise UserError(f"group={group!r}: give how many numbers share a step, 1 or more; 32 is the paper's")
        if keys not in KEYS:
            raise unknown("keys", keys, KEYS)
        super().__init__(window, sinks, flush_size=group)
        self.bits, self.group, self.keys = bits, group, keys

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `Memory.check`."""
        width = head_dim(config)
        check_bits(self.bits, width)
        if width % min(self.group, width):
            raise UserError(f"group={self.group}: it does not divide heads of width {width}; give a divisor")

    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """See `SinkWindowCache.coders`."""
        values = UniformQuantizer(self.bits, min(self.group, head_dim(config)), by_channel=False)
        return UniformQuantizer(self.bits, self.group, by_channel=True) if self.keys == "channel" else values, values

    def token_bytes(self, config: PreTrainedConfig) -> float:
        """Bytes of one coded token in one layer; steps that tokens share are shared out."""
        return self.rate(config) * 2 * kv_heads(config) * head_dim(config) / 8

    def rate(self, config: PreTrainedConfig) -> float:
        """See `SinkWindowCache.rate`."""
        of_values = self.bits + 32 / min(self.group, head_dim(config))
        of_keys = self.bits + 32 / self.group if self.keys == "channel" else of_values
        return (of_keys + of_values) / 2

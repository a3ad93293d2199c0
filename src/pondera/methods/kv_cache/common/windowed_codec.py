"""Base class of KV cache methods with exact sinks, an exact recent window, and codes of all tokens between them."""

from __future__ import annotations

from abc import abstractmethod

from pondera.cache.codec import Codec
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer


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

"""FisherVQ: codes for a KV cache whose bytes go where the loss is: keys before rotary embedding, weighted by squared gradients.

Shapes: L compressed layers, G KV heads, D head width, P rotation pairs, N vectors, K codes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.arch.families import family
from pondera.cache.codec import Codec
from pondera.core.errors import UserError
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.methods.kv_cache.base import compressible
from pondera.methods.kv_cache.common.calibration import FitProgress, clustered, collect, residual_tables
from pondera.methods.kv_cache.common.codebooks import Codebooks, RotaryCodebooks, SharedAngles
from pondera.methods.kv_cache.common.fingerprint import check_fingerprint, fingerprint
from pondera.methods.kv_cache.common.pair_codes import PairCodes, deal_bytes, grouped_units
from pondera.methods.kv_cache.common.rotary_pairs import rotation_pairs
from pondera.methods.kv_cache.common.sensitivity import key_sensitivity
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.models.rotary import rotary_frequencies, rotate_by_position

CODES = 256
"""Codes of a byte."""
VALUE_SHARE = 0.54
"""Share of a token's bytes that its values get."""
LEAST = 0.6
"""A head gets at least this share of the mean bytes of a head, and at most twice the mean."""
FLOOR = 0.01
"""Share of the mean weight that is added to every weight, so that no coordinate is ignored."""

log = logging.getLogger(__name__)


class FisherVQ(SinkWindowCache):
    """Vector codes for the KV cache, with the bytes of keys dealt over layers, heads and rotation pairs by the loss.

    Attention weighs errors of keys very unequally: some layers and rotation pairs decide what is found, others hardly matter.
    `fit` measures this with the gradients of the loss of repeating a text. Keys are coded before rotary embedding, one byte for
    a group of whole rotation pairs; a byte more goes to the head where it saves most weighted error. Values are averaged by
    attention, so random errors cancel: they get residual codes over whole heads, without weights.

    Source: our own; it combines keys before rotary embedding and squared gradients (KVQuant, arXiv 2401.18079), product codes,
    and reverse water-filling.
    Cost: `fit` takes some minutes on a CPU for 135 M parameters. A decoding step looks up and rotates all coded keys:
    about 6 D operations per coded token and KV head, shared by its query heads; values as in `VQKV`. The tables take
    ``2 K D`` bytes for each KV head, and 2 K D for each stage of a layer's values, once per model (`table_bytes`).
    When not to use it: on models without rotary positions, or whose rotary frequencies change with the length (both are
    refused); for sequences hardly longer than window and sinks; for text that differs much from the calibration text.

    Args:
        bits: per cached number of coded tokens, without exact tokens and tables.
        window: number of latest tokens that stay exact; up to ``window + flush_size - 1`` of them do.
        sinks: number of first tokens that stay exact.
        codes: K, at most 256; each code takes a byte.
        flush_size: number of tokens that the cache encodes at a time.
        vectors: maximum number of calibration vectors per table.
        texts: number of texts whose repetition is measured.
        text_tokens: tokens of each of them.
        seed: seed of the calibration.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30)
        >>> method = FisherVQ(bits=2.5625)
        >>> method.layout(config), round(1 - method.rate(config) / 16, 3)  # bytes of a head's key and value; the saved share
        ((19, 22), 0.84)
    """

    paper: ClassVar[str] = "our own; parts from KVQuant, arXiv 2401.18079, and VQKV, arXiv 2603.16435"
    cost: ClassVar[str] = "bits / 16 of the cache's bytes, plus exact window and tables; one calibration per model"
    examples: ClassVar[dict[str, str]] = {
        "exact": "FisherVQ(3, codes=4, vectors=64, texts=1, text_tokens=16)",
        "tight": "FisherVQ(3, window=5, sinks=1, codes=4, flush_size=2, vectors=64, texts=1, text_tokens=16)",
    }

    is_fitted: Tensor

    def __init__(
        self,
        bits: float = 2.5625,
        window: int = 128,
        sinks: int = 4,
        codes: int = CODES,
        flush_size: int = 16,
        vectors: int = 16384,
        texts: int = 16,
        text_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(window, sinks, flush_size)
        if isinstance(bits, bool) or not 0 < bits <= 8:
            raise UserError(f"bits={bits!r}: give bits per cached number, above 0 and at most 8, e.g. 2.5625")
        if isinstance(codes, bool) or not isinstance(codes, int) or not 2 <= codes <= CODES:
            raise UserError(f"codes={codes!r}: give 2 to {CODES}")
        for name, number, least in (("vectors", vectors, codes), ("texts", texts, 1), ("text_tokens", text_tokens, 8)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UserError(f"{name}={number!r}: give a number, {least} or more")
        self.bits, self.codes, self.vectors, self.seed = bits, codes, vectors, seed
        self.texts, self.text_tokens = texts, text_tokens
        self.register_buffer("is_fitted", torch.tensor(False))
        self.fingerprint: dict[str, Any] | None = None
        self._codecs: dict[int, tuple[Any, tuple[Codec, Codec]]] = {}
        self._angles = SharedAngles()

    # Sizes

    def layout(self, config: PreTrainedConfig) -> tuple[int, int]:
        """The mean bytes of a head's key, and the bytes of a head's value.

        Raises:
            UserError: the bits give less than one byte, or a key more bytes than it has rotation pairs.
        """
        D, most = head_dim(config), len(_units(config))
        total = int(2 * self.bits * D / 8)
        values = round(VALUE_SHARE * total)
        keys = total - values
        if not 1 <= keys <= most or values < 1:
            raise UserError(
                f"bits={self.bits}: a head of width {D} would get {keys} bytes for its key and {values} for its value; give "
                f"{self._bits(1, D):g} to {self._bits(most, D):g}"
            )
        return keys, values

    def _bits(self, key_bytes: int, width: int) -> float:
        """The bits at which a key has this many bytes."""
        total = next(n for n in range(2, 9 * width) if n - round(VALUE_SHARE * n) == key_bytes)
        return 8 * total / (2 * width)

    def rate(self, config: PreTrainedConfig) -> float:
        """See `SinkWindowCache.rate`."""
        return 8 * sum(self.layout(config)) / (2 * head_dim(config))

    def table_bytes(self, config: PreTrainedConfig) -> int:
        """Bytes of all tables, once per model."""
        layers, G, D = len(compressible(config)), kv_heads(config), head_dim(config)
        _, values = self.layout(config)
        return layers * self.codes * D * 2 * (G + values)

    # Tables

    @property
    def fitted(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `KVCacheMethod.fitted`."""
        return not self.is_fitted.is_meta and bool(self.is_fitted)

    def bind(self, config: PreTrainedConfig) -> None:
        """See `KVCacheMethod.bind`: creates empty tables with the shapes for this model."""
        L, G, D = len(compressible(config)), kv_heads(config), head_dim(config)
        _, values = self.layout(config)
        self.fingerprint = fingerprint(config)
        self.register_buffer("key_tables", torch.zeros(L, G, self.codes, D, dtype=torch.float16))
        self.register_buffer("key_bytes", torch.zeros(L, G, D, dtype=torch.int16))
        self.register_buffer("key_weights", torch.zeros(L, G, D))
        self.register_buffer("value_tables", torch.zeros(L, values, self.codes, D, dtype=torch.float16))
        self.register_buffer("frequency_P", torch.zeros(len(rotation_pairs(config))))

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`: refuses tables of another model."""
        check_fingerprint(self.fingerprint, config)

    def check_passes(self) -> None:
        """See `KVCacheMethod.check_passes`: refused."""
        raise UserError(
            "FisherVQ measures the loss of models that read tokens in one pass, and a think or chunk method reads them in "
            "several; use VQKV(2.75)"
        )

    def token_cache(self, model: PreTrainedModel, slots_per_token: int) -> Any:
        """See `KVCacheMethod.token_cache`: refused, also with one slot per token."""
        self.check_passes()

    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """See `SinkWindowCache.coders`."""
        keys, values = self.get_buffer("key_tables"), self.get_buffer("value_tables")
        state = [(table.data_ptr(), table._version) for table in (keys, values)]
        known, codecs = self._codecs.get(index, (None, None))
        if codecs is None or known != state:
            of_keys = PairCodes(
                keys[index], self.get_buffer("key_bytes")[index].long(), self.get_buffer("key_weights")[index]
            )
            dims = torch.arange(head_dim(config), device=values.device)
            frequency_P = self.get_buffer("frequency_P")
            codecs = (
                RotaryCodebooks(of_keys, frequency_P, family(config).interleaved, self._angles.of(frequency_P)),
                Codebooks([values[index]], [dims], kv_heads(config)),
            )
            self._codecs[index] = (state, codecs)
        return codecs

    def fit(self, model: PreTrainedModel, samples: Iterable[Tensor]) -> Self:
        """Measures how much the loss depends on each key, deals the bytes and fits the tables.

        Args:
            model: frozen; any causal LM of transformers with rotary positions.
            samples: token ids, ``[B, T]`` each, without padding.

        Raises:
            UserError: there are too few tokens, the model has no rotary frequencies that stay, or a think or chunk method.
        """
        if getattr(model, "method", None) is not None:
            self.check_passes()
        config = model.config.get_text_config(decoder=True)
        self.bind(config)
        self.to(model.device)
        layers, G = compressible(config), kv_heads(config)
        frequency_P = rotary_frequencies(model, "use VQKV()")
        self.get_buffer("frequency_P").copy_(frequency_P)
        rows = [row for sample in samples for row in torch.as_tensor(sample).reshape(-1, sample.shape[-1])]
        tokens = sum(max(0, len(row) - self.sinks) for row in rows)
        if tokens < (needed := -(-2 * self.codes // G)):
            raise UserError(
                f"calibration text too short: tables of {self.codes} codes need {needed} tokens without the first "
                f"{self.sinks} of each sample, and got {tokens}"
            )
        log.info("FisherVQ: measuring how much the loss depends on keys, on %d texts", min(self.texts, len(rows)))
        interleaved = family(config).interleaved
        texts = [row[: self.text_tokens] for row in rows[: self.texts]]
        weight_LGD = key_sensitivity(model, texts, layers, frequency_P, interleaved)
        log.info("FisherVQ: reading keys and values of the calibration text")
        keys, values, position_N = collect(model, (row[None] for row in rows), layers, self.sinks, self.vectors)
        keys = [rotate_by_position(each, -position_N, frequency_P, interleaved) for each in keys]
        self._fit_keys(config, torch.stack(keys), weight_LGD)
        _, stages = self.layout(config)
        progress = FitProgress("FisherVQ, values", stages * len(layers))
        for index, values_GND in enumerate(values):
            tables = residual_tables(
                _some(values_GND.flatten(0, 1), self.vectors, self.seed + index),
                stages,
                progress.counted(clustered(self.codes, self.vectors)),
                self.seed * 1_000_003 + index,
            )
            self.get_buffer("value_tables")[index].copy_(tables)
        self.is_fitted.fill_(True)
        return self

    def _fit_keys(self, config: PreTrainedConfig, keys_LGND: Tensor, weight_LGD: Tensor) -> None:
        """Deals the bytes and fits the tables of keys."""
        units, (L, G) = _units(config), keys_LGND.shape[:2]
        # Both coordinates of a pair have one weight, because positions turn them into each other.
        weight_LGD = _means(weight_LGD, units) + FLOOR * weight_LGD.mean(-1, keepdim=True)
        variance_LGD = _means(keys_LGND.var(2), units) * weight_LGD
        mean_bytes, _ = self.layout(config)
        least, most, bits = max(1, int(LEAST * mean_bytes)), min(len(units), 2 * mean_bytes), math.log2(self.codes)
        dealt_LG = deal_bytes(variance_LGD, mean_bytes * L * G, least, most, bits)
        self.get_buffer("key_weights").copy_(weight_LGD)
        firsts, sizes = torch.tensor([unit[0] for unit in units]), torch.tensor([len(unit) for unit in units])
        progress = FitProgress("FisherVQ, keys", int(dealt_LG.sum()))
        stage = progress.counted(clustered(self.codes, self.vectors))
        generator = torch.Generator().manual_seed(self.seed)
        for layer in range(L):
            number = 0
            for head in range(G):
                variance_U = variance_LGD[layer, head, firsts]
                for group in grouped_units(variance_U.cpu(), sizes, int(dealt_LG[layer, head]), bits):
                    dims = [dim for unit in group for dim in units[unit]]
                    scale_C = weight_LGD[layer, head, dims].sqrt()
                    scaled_NC = keys_LGND[layer, head][:, dims] * scale_C
                    size = scaled_NC.square().mean().sqrt().clamp(min=1e-20)
                    table_KC = stage(scaled_NC / size, generator) * size / scale_C
                    self.get_buffer("key_tables")[layer, head][:, dims] = table_KC.half()
                    self.get_buffer("key_bytes")[layer, head, dims] = number
                    number += 1


def _units(config: PreTrainedConfig) -> list[list[int]]:
    """The coordinates that must be coded together: rotation pairs, and single coordinates that the model does not rotate."""
    pairs = [list(pair) for pair in rotation_pairs(config)]
    rotated = {dim for pair in pairs for dim in pair}
    return pairs + [[dim] for dim in range(head_dim(config)) if dim not in rotated]


def _means(x_LGD: Tensor, units: list[list[int]]) -> Tensor:
    """The mean over the coordinates of each unit, for each coordinate."""
    found_LGD = torch.empty_like(x_LGD)
    for unit in units:
        found_LGD[..., unit] = x_LGD[..., unit].mean(-1, keepdim=True)
    return found_LGD


def _some(x_NC: Tensor, most: int, seed: int) -> Tensor:
    """At most this many rows, drawn at random."""
    if len(x_NC) <= most:
        return x_NC
    return x_NC[torch.randperm(len(x_NC), generator=torch.Generator().manual_seed(seed))[:most].to(x_NC.device)]

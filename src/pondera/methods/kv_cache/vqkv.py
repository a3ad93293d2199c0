"""VQKV: KV cache compression by residual vector quantization, with codebooks calibrated once per model.

Shapes: G KV heads, D head width, J KV heads in one vector, N vectors, C width of a codebook, K codes, L stages.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pondera.arch.dimensions import head_dim, kv_heads
from pondera.arch.families import family
from pondera.cache.codec import Codec
from pondera.core import spec
from pondera.core.errors import UserError, unknown
from pondera.core.hf import PreTrainedConfig, PreTrainedModel
from pondera.core.run_folder import write_atomic
from pondera.methods.kv_cache.base import compressible
from pondera.methods.kv_cache.common.calibration import FitProgress, clustered, collect, learned, residual_tables
from pondera.methods.kv_cache.common.codebooks import ONE_BYTE, TWO_BYTES, Codebooks, RotaryCodebooks, SharedAngles
from pondera.methods.kv_cache.common.fingerprint import check_fingerprint, fingerprint
from pondera.methods.kv_cache.common.rotary_pairs import branches as by_speed
from pondera.methods.kv_cache.common.rotary_pairs import rotation_pairs
from pondera.methods.kv_cache.common.windowed_codec import SinkWindowCache
from pondera.methods.quantize.base import Quantizer
from pondera.methods.quantize.sim_vq import SimVQ
from pondera.models.rotary import rotary_frequencies, rotate_by_position

KEY_STAGES = ("post_rope", "pre_rope")
WIDTHS = ("head", "layer")
FITTINGS = ("simvq", "kmeans")
VECTORS_PER_CODE = 16
"""Minimum number of calibration vectors per code."""
FILE = "kv_cache.safetensors"

log = logging.getLogger(__name__)


class VQKV(SinkWindowCache):
    """Residual vector quantization of the KV cache, except for the first and the latest tokens.

    A key or value is the sum of one codebook vector from each of L codebooks; the cache keeps only their indices. `fit`
    calibrates the codebooks offline on keys and values of ordinary text; the weights of the model do not change.

    Source: VQKV, arXiv 2603.16435: RSimVQ, three sections, keys in two branches, 82.8 % fewer bytes at 2.75 bits per
    value.
    Cost: `fit` takes minutes on a CPU for models of some million parameters. Per cached token, head and query, a step
    needs L additions for scores and L for values, instead of D multiplications each; encoding a token needs L searches
    among K vectors. The codebooks take ``2 L K C`` bytes for keys and for values of each layer, once per model
    (`table_bytes`).
    When not to use it: for sequences hardly longer than window and sinks; for text that differs much from the
    calibration text.
    Resolved: the paper's code was not available. Vectors are single KV heads, and a layer's heads share codebooks; with
    ``width="layer"`` one vector joins all KV heads of a layer. `fit` calibrates the stages one after another, each on
    the residual of the ones before, scaled to a root mean square of 1; it folds the scale into the codebooks, which are
    float16. Each branch gets stages in proportion to its dimensions. `fit` omits the first `sinks` tokens of each
    calibration sample, as the cache never encodes them.

    Bits determine the stages: a head's key and value together get ``floor(2 * bits * D / b)`` stages, with b = 8 for up
    to 256 codes and b = 16 above; the value has half of them, rounded down. So the rate is never above the requested
    bits; it is below if b does not divide (`rate` returns it): at D = 16 with 2.75 bits there are 11 stages, 6 for the
    key.

    Args:
        bits: per cached number, without exact tokens and codebooks.
        window: number of latest tokens that stay exact; up to ``window + flush_size - 1`` of them do.
        sinks: number of first tokens that stay exact.
        codes: K.
        branches: 2: separate codebooks for key dimensions with high and low rotary frequencies; 1: the same for all.
        cut: number of rotation pairs with high frequency; default: `None`, half of them.
        key_stage: ``"post_rope"``: encodes keys after rotary embedding; ``"pre_rope"``: before, so that every decoding
            applies the rotary embedding again, and scores cannot come from look-up tables.
        width: ``"head"`` or ``"layer"``: the extent of one vector.
        fitting: ``"simvq"``, by gradient descent, or ``"kmeans"``.
        quantizer: quantizer of a trained stage, with `codes` codes; default: `None`, ``SimVQ(codes, init="match")``.
        flush_size: number of tokens that the cache encodes at a time, counted from the first token of their sequence.
        steps: number of training steps per stage.
        vectors: maximum number of calibration vectors per codebook; default: `None`, 65,536, or more if K codes need
            more.
        seed: seed of the calibration.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
        >>> method = VQKV(bits=2.75)
        >>> method.token_bytes(config), 1 - method.rate(config) / 16  # per layer and token; the saved share
        (704, 0.828125)
    """

    paper: ClassVar[str] = "VQKV, arXiv 2603.16435"
    cost: ClassVar[str] = "bits / 16 of the cache's bytes, plus exact window and codebooks; one calibration per model"
    examples: ClassVar[dict[str, str]] = {
        "exact": "VQKV(2, codes=4, vectors=64, fitting='kmeans', branches=1)",
        "tight": "VQKV(2, window=5, sinks=1, flush_size=2, codes=4, vectors=64, fitting='kmeans', branches=1)",
    }

    is_fitted: Tensor

    def __init__(
        self,
        bits: float = 2.75,
        window: int = 128,
        sinks: int = 4,
        codes: int = 256,
        branches: int = 2,
        cut: int | None = None,
        key_stage: str = "post_rope",
        width: str = "head",
        fitting: str = "simvq",
        quantizer: Quantizer | None = None,
        flush_size: int = 16,
        steps: int = 100,
        vectors: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(window, sinks, flush_size)
        if isinstance(bits, bool) or not 0 < bits <= 16:
            raise UserError(f"bits={bits!r}: give bits per cached number, above 0 and at most 16; the paper uses 2.75")
        if isinstance(codes, bool) or not isinstance(codes, int) or not 2 <= codes <= TWO_BYTES:
            raise UserError(f"codes={codes!r}: give 2 to {TWO_BYTES}; up to {ONE_BYTE} are stored in one byte each")
        if branches not in (1, 2):
            raise UserError(f"branches={branches!r}: give 1 or 2")
        for name, given, allowed in (
            ("key_stage", key_stage, KEY_STAGES),
            ("width", width, WIDTHS),
            ("fitting", fitting, FITTINGS),
        ):
            if given not in allowed:
                raise unknown(name, given, allowed)
        vectors = max(65536, VECTORS_PER_CODE * codes) if vectors is None else vectors
        if steps < 1 or vectors < VECTORS_PER_CODE * codes:
            raise UserError(
                f"steps={steps}, vectors={vectors}: give 1 step or more, and at least {VECTORS_PER_CODE} vectors "
                f"per code, {VECTORS_PER_CODE * codes} for {codes} codes"
            )
        if quantizer is not None and (getattr(quantizer, "codes", None) != codes or quantizer.dim):
            raise UserError(
                f"quantizer={quantizer!r}: give a quantizer with {codes} codes, such as "
                f"SimVQ({codes}, hidden=64); the number of stages comes from bits"
            )
        self.bits, self.codes, self.branches, self.cut = bits, codes, branches, cut
        self.key_stage, self.width, self.fitting, self.quantizer_spec = key_stage, width, fitting, quantizer
        self.steps, self.vectors, self.seed = steps, vectors, seed
        self.register_buffer("is_fitted", torch.tensor(False))
        self.fingerprint: dict[str, Any] | None = None
        self._codecs: dict[int, tuple[Any, tuple[Codec, Codec]]] = {}
        self._angles = SharedAngles()

    # Sizes

    def layout(self, config: PreTrainedConfig) -> tuple[list[list[int]], list[int], int]:
        """The dimensions of each key branch and its number of stages, and the number of stages of values.

        Raises:
            UserError: the bits do not suffice for one stage per codebook, or the keys have no rotation pairs for two
                branches.
        """
        D, joined = head_dim(config), self._joined(config)
        total = int(2 * self.bits * D * joined / self.index_bits)
        values = total // 2
        keys = total - values
        if values < 1 or keys < self.branches:
            least = (2 * self.branches - (self.branches > 1)) * self.index_bits / (2 * D * joined)
            raise UserError(
                f"bits={self.bits}: with heads of width {D} and {self.index_bits} bits per code, that is less than one "
                f"stage per codebook; give at least {least:g}" + (", or branches=1" if self.branches > 1 else "")
            )
        if self.key_stage == "pre_rope":
            rotation_pairs(config)  # raises for models without rotary embedding
        if self.branches == 1:
            return [list(range(D))], [keys], values
        pairs = rotation_pairs(config)
        dims = by_speed(pairs, D, len(pairs) // 2 if self.cut is None else self.cut)
        fast = min(keys - 1, max(1, round(keys * len(dims[0]) / D)))
        return dims, [fast, keys - fast], values

    @property
    def index_bits(self) -> int:
        """Bits of a stored code."""
        return 8 if self.codes <= ONE_BYTE else 16

    def _joined(self, config: PreTrainedConfig) -> int:
        return kv_heads(config) if self.width == "layer" else 1

    def token_bytes(self, config: PreTrainedConfig) -> int:
        """Bytes of one encoded token in one layer."""
        _, keys, values = self.layout(config)
        return (sum(keys) + values) * self.index_bits // 8 * kv_heads(config) // self._joined(config)

    def rate(self, config: PreTrainedConfig) -> float:
        """See `SinkWindowCache.rate`."""
        return 8 * self.token_bytes(config) / (2 * kv_heads(config) * head_dim(config))

    def saving(self, config: PreTrainedConfig, tokens: int | None = None, number_bytes: int = 2) -> float:
        """The share of the cache's bytes that the method saves, without codebooks.

        Args:
            config: text config of the model.
            tokens: length of a sequence, including window and sinks; default: `None`, the limit of long sequences.
            number_bytes: bytes of an exact number.
        """
        exact = 2 * number_bytes * kv_heads(config) * head_dim(config)
        if tokens is None:
            return 1 - self.token_bytes(config) / exact
        coded = max(0, tokens - self.sinks - self.window) // self.flush_size * self.flush_size
        return 1 - ((tokens - coded) * exact + coded * self.token_bytes(config)) / (tokens * exact)

    def table_bytes(self, config: PreTrainedConfig) -> int:
        """Bytes of all codebooks, once per model: 2 L K C each."""
        dims, keys, values = self.layout(config)
        J = self._joined(config)
        widths = sum(len(each) * J * stages for each, stages in zip(dims, keys, strict=True))
        return 2 * self.codes * (widths + values * head_dim(config) * J) * len(compressible(config))

    # Codebooks

    @property
    def fitted(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `KVCacheMethod.fitted`."""
        return not self.is_fitted.is_meta and bool(self.is_fitted)

    def bind(self, config: PreTrainedConfig) -> None:
        """See `KVCacheMethod.bind`: creates empty codebooks with the shapes for this model."""
        dims, keys, values = self.layout(config)
        self.fingerprint = fingerprint(config)
        D, J = head_dim(config), self._joined(config)
        for index in range(len(compressible(config))):
            for branch, (each, stages) in enumerate(zip(dims, keys, strict=True)):
                shape = (stages, self.codes, J * len(each))
                self.register_buffer(f"keys_{index}_{branch}", torch.zeros(shape, dtype=torch.float16))
            self.register_buffer(f"values_{index}", torch.zeros(values, self.codes, J * D, dtype=torch.float16))
        if self.key_stage == "pre_rope":
            self.register_buffer("frequency_P", torch.zeros(len(rotation_pairs(config))))

    def check(self, config: PreTrainedConfig, layers: list[int]) -> None:
        """See `KVCacheMethod.check`: refuses codebooks of another model."""
        check_fingerprint(self.fingerprint, config)

    def coders(self, config: PreTrainedConfig, index: int) -> tuple[Codec, Codec]:
        """See `SinkWindowCache.coders`."""
        dims, _, _ = self.layout(config)
        keys = [self.get_buffer(f"keys_{index}_{branch}") for branch in range(len(dims))]
        values = self.get_buffer(f"values_{index}")
        state = [(table.data_ptr(), table._version) for table in (*keys, values)]
        known, codecs = self._codecs.get(index, (None, None))
        if codecs is None or known != state:
            codecs = self._coders(config, dims, keys, values)
            self._codecs[index] = (state, codecs)
        return codecs

    def _coders(
        self, config: PreTrainedConfig, dims: list[list[int]], keys: list[Tensor], values: Tensor
    ) -> tuple[Codec, Codec]:
        G, J, device = kv_heads(config), self._joined(config), values.device
        of_keys: Codec = Codebooks(keys, [torch.tensor(each, device=device) for each in dims], G, J)
        if self.key_stage == "pre_rope":
            frequency_P = self.get_buffer("frequency_P")
            of_keys = RotaryCodebooks(of_keys, frequency_P, family(config).interleaved, self._angles.of(frequency_P))
        return of_keys, Codebooks([values], [torch.arange(head_dim(config), device=device)], G, J)

    def fit(self, model: PreTrainedModel, samples: Iterable[Tensor]) -> Self:
        """Calibrates the codebooks on keys and values of a model.

        Args:
            model: frozen; any causal LM of transformers.
            samples: token ids, ``[B, T]`` each, without padding; `fit` reads only as many as it needs.

        Raises:
            UserError: there are too few tokens, the layout of keys is not supported, or the rotary frequencies change
                with the length of the sequence (only for ``key_stage="pre_rope"``).
        """
        config = model.config.get_text_config(decoder=True)
        layers, J = compressible(config), self._joined(config)
        per_token = kv_heads(config) // J
        self.bind(config)
        self.to(model.device)
        log.info("VQKV: reading keys and values of the calibration text")
        keys, values, position_N = collect(model, samples, layers, self.sinks, -(-self.vectors // per_token))
        least = -(-VECTORS_PER_CODE * self.codes // per_token)
        if len(position_N) < least:
            raise UserError(
                f"calibration text too short: codebooks of {self.codes} codes need {least} tokens without the first "
                f"{self.sinks} of each sample, and got {len(position_N)}; give {least - len(position_N)} more"
            )
        if keys[0].shape[-1] != head_dim(config) or values[0].shape[-1] != head_dim(config):
            raise UserError(
                f"{config.model_type}: keys of width {keys[0].shape[-1]} and values of width {values[0].shape[-1]}, "
                f"but heads of width {head_dim(config)}; VQKV does not support this layout"
            )
        if self.key_stage == "pre_rope":
            frequency_P = self.get_buffer("frequency_P")
            frequency_P.copy_(rotary_frequencies(model, 'use key_stage="post_rope"'))
            interleaved = family(config).interleaved
            keys = [rotate_by_position(each, -position_N, frequency_P, interleaved) for each in keys]
        _, key_stages, value_stages = self.layout(config)
        progress = FitProgress("VQKV", (sum(key_stages) + value_stages) * len(layers))
        log.info("VQKV: fitting %d codebooks to %d tokens", progress.codebooks, len(position_N))
        for index in range(len(layers)):
            self._fit_layer(config, index, keys[index], values[index], progress)
            error = self._errors(config, index, keys[index], values[index])
            log.info("VQKV: calibrated layer %d of %d; error of keys %.3f, values %.3f", index + 1, len(layers), *error)
        self.is_fitted.fill_(True)
        return self

    def _fit_layer(
        self, config: PreTrainedConfig, index: int, keys_GND: Tensor, values_GND: Tensor, progress: FitProgress
    ) -> None:
        """Fills the codebooks of a layer."""
        if self.fitting == "kmeans":
            stage = clustered(self.codes)
        else:
            stage = learned(self.quantizer_spec or SimVQ(self.codes, init="match"), self.steps)
        dims, key_stages, value_stages = self.layout(config)
        parts = [(f"keys_{index}_{branch}", keys_GND[..., each]) for branch, each in enumerate(dims)]
        parts.append((f"values_{index}", values_GND))
        for place, ((name, x_GNC), stages) in enumerate(zip(parts, [*key_stages, value_stages], strict=True)):
            x_NC = x_GNC.unflatten(0, (-1, self._joined(config))).transpose(1, 2).flatten(2).flatten(0, 1)
            seed = self.seed * 1_000_003 + index * 101 + place
            self.get_buffer(name).copy_(residual_tables(x_NC, stages, progress.counted(stage), seed))

    def _errors(self, config: PreTrainedConfig, index: int, keys_GND: Tensor, values_GND: Tensor) -> list[float]:
        """Relative squared error of keys and of values, on a part of the calibration vectors."""
        coders = self.coders(config, index)
        keys = coders[0].of if isinstance(coders[0], RotaryCodebooks) else coders[0]
        errors = []
        for codec, x_GND in ((keys, keys_GND), (coders[1], values_GND)):
            some_BGSD = x_GND[None, :, :4096]
            rest = codec.decode(codec.encode(some_BGSD, None), None) - some_BGSD
            errors.append(float(rest.square().sum() / some_BGSD.square().sum()))
        return errors

    def at(self, bits: float, config: PreTrainedConfig) -> VQKV:
        """The same codebooks without their last stages, equal to the result of `fit` with these bits.

        Args:
            bits: at most those of the calibration.
            config: text config of the model.

        Raises:
            UserError: the codebooks have too few stages, or are not calibrated yet.
        """
        if not self.fitted or bits > self.bits:
            raise UserError(f"at({bits}): give at most the {self.bits} bits of the calibrated codebooks")
        self.check(config, [])
        own = spec.parse(repr(self))
        method = spec.build(replace(own, args=(), kwargs=own.kwargs | {"bits": bits}), "kv_cache")
        method.bind(config)
        for name, table in self.named_buffers():
            like = method.get_buffer(name)
            method.register_buffer(name, table[: len(like)].clone() if like.ndim else table.clone())
        return method

    # On disk

    def save(self, folder: str | Path) -> Path:
        """Writes the codebooks into a folder, such as that of the model, as ``kv_cache.safetensors``.

        Raises:
            UserError: there are no codebooks yet.
        """
        from safetensors.torch import save

        if not self.fitted:
            raise UserError("this VQKV has no codebooks to save yet: method.fit(model, samples)")
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"method": repr(self), "fingerprint": json.dumps(self.fingerprint)}
        write_atomic(path, save({name: table.contiguous() for name, table in self.state_dict().items()}, metadata))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a calibrated method that `save` has written.

        Raises:
            UserError: the folder has no such file, or the file is invalid.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / FILE
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            described, stated = metadata["method"], json.loads(metadata["fingerprint"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write it with method.save({str(folder)!r})") from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a VQKV codebook file ({error})") from None
        method = spec.build(described, "kv_cache")
        if not isinstance(method, cls):
            raise UserError(f"{path}: contains {described}, not a {cls.__name__}")
        for name, table in tables.items():
            if name.split("_")[0] not in ("keys", "values", "frequency", "is"):
                raise UserError(f"{path}: {name!r} is not a tensor of VQKV")
            method.register_buffer(name, table)
        method.fingerprint = stated
        return method

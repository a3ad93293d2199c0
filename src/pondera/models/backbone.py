"""Backbone: a Hugging Face causal LM with access to embeddings, decoder passes, layer ranges and head.

Shapes: B batch, T tokens, S KV slots of the call, K cached and new KV slots, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.arch.dimensions import layer_kinds
from pondera.arch.families import Modules, family, listed, modules
from pondera.cache.attention import KEYWORD, Asked, Server, route
from pondera.cache.key_bias import LogWeight
from pondera.cache.masks import SlotMask, document_mask, has_documents
from pondera.cache.packing import Packed, PackedRows
from pondera.core.errors import UserError
from pondera.core.hf import (
    CACHE,
    Cache,
    Conv1D,
    PreTrainedConfig,
    PreTrainedModel,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from pondera.models.rotary import Rotary
from pondera.models.top_logits import top_logits


class Backbone(nn.Module):
    """A causal LM split at its public interfaces: embeddings, decoder passes, head.

    Args:
        lm: any transformers causal LM.
        unit_rms: the initialisation gives token embeddings unit RMS, the same as final hidden states.
        sample_BTD: typical inputs of layers whose inputs are not tokens; default: `None`, token embeddings.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
        >>> backbone = Backbone(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> h_BTD = backbone.step(backbone.embed(torch.tensor([[1, 2, 3]])))
        >>> backbone.head(h_BTD).shape
        torch.Size([1, 3, 97])
    """

    decoder: nn.Module
    """The decoder stack without the head."""

    def __init__(self, lm: PreTrainedModel, unit_rms: bool = False, sample_BTD: Tensor | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.unit_rms, self._sample_BTD = unit_rms, sample_BTD
        self.config: PreTrainedConfig = lm.config.get_text_config(decoder=True)
        # Looked up once, because it is called for every token; not registered as a submodule, since `lm` contains it.
        object.__setattr__(self, "decoder", lm.get_decoder())
        self._routed = False
        self._logit_scale = (getattr(self.config, "logit_scale", None) or 1.0) / getattr(
            self.config, "logits_scaling", 1.0
        )
        self._logit_cap: float | None = getattr(self.config, "final_logit_softcapping", None)

    @property
    def layer_types(self) -> list[str]:
        """``full_attention``, ``sliding_attention`` or ``linear_attention`` for each layer."""
        return layer_kinds(self.config)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings, the inputs of the decoder, ``[B, T, D]``."""
        return self.lm.get_input_embeddings()(ids_BT)

    def random_tokens(self, length: int = 64) -> Tensor:
        """Token ids ``[4, length]`` on which scales are measured, the same in every call; shorter if positions end earlier."""
        length = min(length, getattr(self.config, "max_position_embeddings", length))
        draw = torch.Generator("cpu").manual_seed(0)
        ids_BT = torch.randint(self.config.vocab_size, (4, length), generator=draw, device="cpu")
        return ids_BT.to(next(self.parameters()).device)

    def typical_inputs(self, ids_BT: Tensor) -> Tensor:
        """Inputs of the usual RMS, ``[B, T, D]``: the embeddings of these tokens, or `sample_BTD` if inputs are not tokens."""
        return self.embed(ids_BT) if self._sample_BTD is None else self._sample_BTD

    def mix_embeddings(self, weights_BTV: Tensor, ids_BTV: Tensor | None = None) -> Tensor:
        """Weighted sums of token embeddings, ``[B, T, D]``, with the scale of `embed`.

        Args:
            weights_BTV: weights of all tokens, or of the tokens `ids_BTV`.
            ids_BTV: token ids to mix at each position; default: `None`, all tokens.
        """
        if ids_BTV is None:
            every_V = torch.arange(weights_BTV.shape[-1], device=weights_BTV.device)
            return weights_BTV @ self.embed(every_V)
        table = cast(nn.Embedding, self.lm.get_input_embeddings())
        scale = float(getattr(table, "embed_scale", 1.0))
        weights = (weights_BTV * scale).to(table.weight.dtype).flatten(0, 1)
        mixed = F.embedding_bag(ids_BTV.flatten(0, 1), table.weight, per_sample_weights=weights, mode="sum")
        return mixed.unflatten(0, ids_BTV.shape[:2])

    def head(self, h_BTD: Tensor) -> Tensor:
        """Logits of final hidden states, ``[B, T, V]``."""
        return self._as_the_model_gives_them(cast(nn.Module, self.lm.get_output_embeddings())(h_BTD))

    @property
    def plain_logits(self) -> bool:
        """Whether the logits are the unchanged output of the head."""
        return self._logit_scale == 1.0 and self._logit_cap is None

    def top(self, h_BTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The highest logits of final hidden states and their token ids, ``[B, T, count]`` each."""
        head = self.lm.get_output_embeddings()
        own_product = type(head) is not nn.Linear and not torch.is_grad_enabled()  # of a kernel, or of other weights
        if not isinstance(head, nn.Linear) or head.bias is not None or own_product:
            return self.head(h_BTD).topk(count, dim=-1)
        logits_BTk, ids_BTk = top_logits(h_BTD, head.weight, count)
        return self._as_the_model_gives_them(logits_BTk), ids_BTk

    def _as_the_model_gives_them(self, logits_BTV: Tensor) -> Tensor:
        if self._logit_scale != 1.0:
            logits_BTV = logits_BTV * self._logit_scale
        return logits_BTV if self._logit_cap is None else torch.tanh(logits_BTV / self._logit_cap) * self._logit_cap

    @torch.no_grad()
    def check_head(self) -> None:
        """Raises if the model post-processes its logits in an unsupported way.

        Raises:
            UserError: `embed`, `step` and `head` do not give the logits of the model.
        """
        was_training, ids_BT = self.training, torch.arange(4, device=self.lm.device)[None]
        self.eval()
        try:
            ours, theirs = self.head(self.step(self.embed(ids_BT))), self.lm(input_ids=ids_BT, use_cache=False).logits
        except Exception as error:  # an architecture can raise anything
            raise UserError(
                f"backbone: {self.config.model_type} does not support separate calls of embeddings, decoder and head "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); tested architectures: "
                f"{listed(lambda each: each.support != 'expected')}"
            ) from error
        finally:
            self.train(was_training)
        if not torch.allclose(ours.float(), theirs.float(), atol=1e-2 * float(theirs.abs().max()), rtol=1e-2):
            raise UserError(
                f"backbone: {self.config.model_type}: unsupported logit post-processing (soft-capping and scaling are "
                f"supported); tested architectures: {listed(lambda each: each.support != 'expected')}"
            )

    def step(
        self,
        h_BSD: Tensor,
        cache: Cache | None = None,
        mask: Tensor | SlotMask | Mapping[str, SlotMask] | None = None,
        position_ids: Tensor | None = None,
        rows: PackedRows | None = None,
        log_weight_BS: Tensor | None = None,
        attention: Server | None = None,
    ) -> Tensor:
        """One pass through the whole decoder; returns hidden states after the final norm, ``[B, S, D]``.

        Args:
            h_BSD: one input vector per KV slot; packed as ``[1, N, D]`` if `rows` is given.
            cache: cache of KV slots; new ones are appended.
            mask: `None`, a 2-D mask over cached and new slots (1 = real, 0 = padding; without a cache also the document
                numbers 1, 2, 3, ...), a `SlotMask`, or a `SlotMask` per layer type.
            position_ids: ``[B, S]`` token positions, equal for the slots of one token; packed like the inputs.
            rows: batch row and slot of each row of a packed call; `mask` must then be a `SlotMask` of the whole batch.
            log_weight_BS: bias on the attention scores of each slot, like `SlotMask.log_weight_BK`, but as an additional
                coordinate of queries and keys, which fused kernels and gradients support. Needs no cache.
            attention: replaces the attention function of all layers.
        """
        _begin(cache)
        call: dict[str, Any] = {
            "inputs_embeds": h_BSD,
            "attention_mask": self._attention_mask(h_BSD, cache, mask, position_ids),
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": cache is not None,
        }
        if log_weight_BS is not None:
            attention = LogWeight(log_weight_BS)
        elif attention is None and rows is not None and rows.batch > 1:
            attention = Packed(rows)
        if attention is None:
            return self.decoder(**call).last_hidden_state
        if not self._routed:  # not before it is needed: the hooks break graphs of torch.compile
            route(self.decoder)
            self._routed = True
        asked = Asked(attention)
        out_BSD = self.decoder(**call, **{KEYWORD: asked}).last_hidden_state
        asked.check(self.config.model_type)
        return out_BSD

    def run(
        self,
        h_BSD: Tensor,
        layers: range,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Runs a range of layers; ``run(h, range(0, n))`` equals `step`. The first range adds positions, the last one the norm.

        Args:
            h_BSD: inputs of the first layer of the range, ``[B, S, D]``.
            layers: a range of layer numbers with step 1.
            cache, mask, position_ids: as for `step`, without `SlotMask`.

        Raises:
            UserError: the layers of this architecture are not mapped.
        """
        parts = self._mapped_modules()
        decoder, count = self.decoder, self.config.num_hidden_layers
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= count:
            raise UserError(
                f"layers: {layers} is not a range within the {count} layers of this {self.config.model_type}"
            )
        if not layers:
            return h_BSD
        _begin(cache)
        # An earlier range of this pass may have updated its layers, so lengths are read from the layers of this range.
        own_cache = Cache(layers=cache.layers[layers.start :]) if cache is not None else None
        if position_ids is None:
            seen = own_cache.get_seq_length() if own_cache is not None else 0
            position_ids = torch.arange(seen, seen + h_BSD.shape[1], device=h_BSD.device)[None]
        if parts.positions and layers.start == 0:
            h_BSD = h_BSD + getattr(decoder, parts.positions)(position_ids)
        masks = self._layer_masks(h_BSD, own_cache, mask, position_ids)
        types = self.layer_types
        # Computed once per layer type: the rotary embedding takes a dozen small operations, which would slow down decoding.
        arguments = {
            kind: {"attention_mask": masks[kind], parts.cache_argument or CACHE: cache, "use_cache": cache is not None}
            | self._turned(kind, position_ids, h_BSD)
            for kind in {types[index] for index in layers}
        }
        for index in layers:
            h_BSD = getattr(decoder, parts.layers)[index](h_BSD, **arguments[types[index]])
        return getattr(decoder, parts.norm)(h_BSD) if layers.stop == count else h_BSD

    def _turned(self, kind: str, position_ids: Tensor, h_BSD: Tensor) -> dict[str, Any]:
        """Rotary arguments of the layers of one type; empty for learned position embeddings."""
        rotation = self.rotation(kind, position_ids, h_BSD)
        if rotation is None:
            return {}
        return {"position_embeddings": (rotation.cos_BSr, rotation.sin_BSr), "position_ids": position_ids}

    def rotation(self, kind: str, position_ids: Tensor, h_BSD: Tensor) -> Rotary | None:
        """The rotary embedding of these positions, or `None` for learned position embeddings.

        Args:
            kind: layer type, as in `layer_types`; some architectures use several frequencies.
            position_ids: ``[B or 1, S]``; may be negative.
            h_BSD: inputs of the call, for dtype and device.

        Raises:
            UserError: the layers of this architecture are not mapped.
        """
        parts = self._mapped_modules()
        if parts.rotary is None:
            return None
        of_kind = (kind,) if parts.rotary_by_kind else ()
        cos_BSr, sin_BSr = getattr(self.decoder, parts.rotary)(h_BSD, position_ids, *of_kind)
        return Rotary(cos_BSr, sin_BSr, family(self.config).interleaved)

    def more_layers(self, count: int, sample_BTD: Tensor | None = None) -> Backbone:
        """Creates new layers of the same architecture with a final norm, for inputs that are not tokens.

        They use full attention, also if the layers of the backbone have windows. Learned position embeddings are already in
        the inputs and are not added again.

        Args:
            count: number of layers.
            sample_BTD: typical inputs of these layers, on which a think method measures its scales; default: `None`,
                unknown.
        """
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = ["full_attention"] * count
        else:
            config.sliding_window = None
        config.vocab_size, config.pad_token_id = 1, None  # of the unused embedding table
        decoder: PreTrainedModel = cast(Any, type(self.decoder))(config)
        for (
            parameter
        ) in decoder.parameters():  # not the rotary frequencies, which are not saved and stay exact when loaded
            parameter.data = parameter.data.to(self.lm.dtype)
        if self.unit_rms:
            scaled_init(decoder)
        decoder.set_input_embeddings(_NoTokens())
        if positions := self._mapped_modules().positions:
            setattr(decoder, positions, _NoPositions())
        return Backbone(decoder, self.unit_rms, sample_BTD)

    def _mapped_modules(self) -> Modules:
        parts = modules(self.config)
        if parts is None:
            raise UserError(
                f"{self.config.model_type}: layer ranges are not supported for this architecture, so methods that split the "
                f"stack cannot run on it; supported: {listed(lambda each: each.modules)}. Methods that use whole passes work."
            )
        return parts

    def _layer_masks(
        self, h_BSD: Tensor, cache: Cache | None, mask: Tensor | None, position_ids: Tensor
    ) -> dict[str, Tensor | None]:
        if mask is None and cache is None:
            mask = _all_real(h_BSD)
        if mask is not None and cache is None and has_documents(mask):
            return self._masks_by_kind(h_BSD, document_mask(mask))
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: makers[kind](
                config=self.config,
                inputs_embeds=h_BSD,
                attention_mask=mask,
                position_ids=position_ids,
                **cast(Any, {CACHE: cache}),
            )
            for kind in set(self.layer_types)
        }

    def _attention_mask(
        self,
        h_BSD: Tensor,
        cache: Cache | None,
        mask: Tensor | SlotMask | Mapping[str, SlotMask] | None,
        position_ids: Tensor | None,
    ) -> Any:
        if isinstance(mask, (SlotMask, Mapping)):
            return self._dense_masks(h_BSD, mask)
        if mask is None and cache is None and position_ids is not None:
            # Without a mask transformers treats position ids that are not 0, 1, 2, ... as packed documents. KV slots of one
            # token share a position, so each would become a separate document.
            return _all_real(h_BSD)
        if mask is not None and cache is None and has_documents(mask):
            return self._dense_masks(h_BSD, document_mask(mask))
        return mask

    def _dense_masks(self, h_BSD: Tensor, mask: SlotMask | Mapping[str, SlotMask]) -> Any:
        """The 4-D masks that replace those of the decoder, one per layer type if there are several."""
        masks = self._masks_by_kind(h_BSD, mask)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _masks_by_kind(self, h_BSD: Tensor, mask: SlotMask | Mapping[str, SlotMask]) -> dict[str, Tensor | None]:
        kinds = set(self.layer_types)
        if "linear_attention" in kinds:
            raise UserError(
                f"{self.config.model_type}: linear-attention layers read KV slots in storage order and do not support a "
                "custom mask; use a method that only needs causal order, such as PonderLM2, and data.document_mask: false"
            )
        masks: dict[str, Tensor | None] = {}
        for kind in kinds:
            own = mask[kind] if isinstance(mask, Mapping) else mask
            allowed_BSK = own.allowed_BSK
            if kind == "sliding_attention":
                distance_BSK = own.query_positions_BS[:, :, None] - own.key_positions_BK[:, None, :]
                allowed_BSK = allowed_BSK & (distance_BSK < self.config.sliding_window)
            masks[kind] = self._as_attention_takes_it(allowed_BSK, own.log_weight_BK, h_BSD.dtype)
        return masks

    def _as_attention_takes_it(self, allowed_BSK: Tensor, log_weight_BK: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The 4-D mask, ``[B, 1, S, K]``: boolean if possible, else additive."""
        if log_weight_BK is None and self.config._attn_implementation != "eager":
            return allowed_BSK[:, None]
        added = allowed_BSK.new_zeros(()) if log_weight_BK is None else log_weight_BK[:, None]
        return torch.where(allowed_BSK, added.to(dtype), torch.finfo(dtype).min)[:, None]


def _begin(cache: Cache | None) -> None:
    """Notes that a call may change the cache from now on; see `pondera.cache.token_cache.TokenCache.call`."""
    if cache is not None:
        cache.begun = True  # type: ignore[attr-defined]


def _all_real(h_BSD: Tensor) -> Tensor:
    return torch.ones(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)


class _NoTokens(nn.Module):
    """Replaces the token embeddings of layers whose inputs are not tokens."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        raise UserError("these layers run on vectors that are not tokens, so there are no token embeddings to look up")


class _NoPositions(nn.Module):
    """Replaces a learned position embedding by zeros."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


@torch.no_grad()
def scaled_init(lm: PreTrainedModel) -> None:
    """Truncated normal initialisation with std sqrt(2/5D), cut at 3 std; residual outputs are divided by sqrt(2 layers).

    Source: the public code of the PonderLM papers. With embeddings multiplied by sqrt(5D/2), token inputs and fed-back
    hidden states both have about unit RMS.

    Args:
        lm: the new model; changed in place.
    """
    config = lm.config.get_text_config(decoder=True)
    std = math.sqrt(2 / (5 * config.hidden_size))
    residual_outputs = ("o_proj", "out_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    for name, module in lm.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            scale = std / math.sqrt(2 * config.num_hidden_layers) if name.endswith(residual_outputs) else std
            nn.init.trunc_normal_(module.weight, std=scale, a=-3 * scale, b=3 * scale)

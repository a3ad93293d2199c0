"""Any Hugging Face causal LM as a backbone: the only file that knows what is inside a decoder.

Shapes: B batch, T tokens, S slots (rows of the call), K cached and new rows together, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.attention import KEYWORD, Asked, Server, route
from pondera.cache.key_bias import LogWeight
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


@dataclass
class SlotMask:
    """Which cached rows each row of a call may attend to, when that is not plain causal order.

    Args:
        allowed_BSK: bool; batch may be 1.
        query_positions_BS: token position of each row.
        key_positions_BK: token position of each cached and new row. Positions let sliding-window layers keep their
            window in tokens, however many slots a token owns.
        log_weight_BK: added to every attention score of that row; none: all rows count alike.
    """

    allowed_BSK: Tensor
    query_positions_BS: Tensor
    key_positions_BK: Tensor
    log_weight_BK: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its parts, and how its layers take the cache."""

    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    cache_argument: str = CACHE


LAYOUTS = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen3": Layout(),
    "gemma3_text": Layout(),
    "gpt_neox": Layout(norm="final_layer_norm", cache_argument="layer_past"),
    "gpt2": Layout(layers="h", norm="ln_f", rotary=None, positions="wpe"),
}


class Backbone(nn.Module):
    """A causal LM taken apart at its public joints: embed, whole passes, head.

    Args:
        lm: any transformers causal LM.
        unit_rms: the weights were drawn so that token embeddings enter at unit RMS, as final states leave.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
        >>> backbone = Backbone(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> h_BTD = backbone.step(backbone.embed(torch.tensor([[1, 2, 3]])))
        >>> backbone.head(h_BTD).shape
        torch.Size([1, 3, 97])
    """

    decoder: nn.Module
    """The stack without the head."""

    def __init__(self, lm: PreTrainedModel, unit_rms: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.unit_rms = unit_rms
        self.config: PreTrainedConfig = lm.config.get_text_config(decoder=True)
        # Looked up once, as it is called for every token; past nn.Module's registry, where it would be a second copy.
        object.__setattr__(self, "decoder", lm.get_decoder())
        self._routed = False
        self._logit_scale = (getattr(self.config, "logit_scale", None) or 1.0) / getattr(
            self.config, "logits_scaling", 1.0
        )
        self._logit_cap: float | None = getattr(self.config, "final_logit_softcapping", None)

    @property
    def layer_types(self) -> list[str]:
        """``full_attention``, ``sliding_attention`` or ``linear_attention`` for each layer."""
        types = getattr(self.config, "layer_types", None)
        if types is None:
            kind = "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"
            types = [kind] * self.config.num_hidden_layers
        return list(types)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings as the decoder takes them, ``[B, T, D]``."""
        return self.lm.get_input_embeddings()(ids_BT)

    def mix_embeddings(self, weights_BTV: Tensor, ids_BTV: Tensor | None = None) -> Tensor:
        """Weighted sums of token embeddings, ``[B, T, D]``, scaled as `embed` scales them.

        Args:
            weights_BTV: of all tokens, or of those that `ids_BTV` names.
            ids_BTV: which tokens are mixed at each position; none: all of them.
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
        """Logits ``[B, T, V]`` of final hidden states."""
        return self._as_the_model_gives_them(cast(nn.Module, self.lm.get_output_embeddings())(h_BTD))

    @property
    def plain_logits(self) -> bool:
        """Whether the model's logits are its head's output as it is."""
        return self._logit_scale == 1.0 and self._logit_cap is None

    def top(self, h_BTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The highest logits of final hidden states and the tokens they belong to, ``[B, T, count]`` each."""
        head = self.lm.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            return self.head(h_BTD).topk(count, dim=-1)
        logits_BTk, ids_BTk = top_logits(h_BTD, head.weight, count)
        return self._as_the_model_gives_them(logits_BTk), ids_BTk

    def _as_the_model_gives_them(self, logits_BTV: Tensor) -> Tensor:
        if self._logit_scale != 1.0:
            logits_BTV = logits_BTV * self._logit_scale
        return logits_BTV if self._logit_cap is None else torch.tanh(logits_BTV / self._logit_cap) * self._logit_cap

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuses a model whose logits are more than its head's output, in a way that `head` does not know."""
        was_training, ids_BT = self.training, torch.arange(4, device=self.lm.device)[None]
        self.eval()
        try:
            ours, theirs = self.head(self.step(self.embed(ids_BT))), self.lm(input_ids=ids_BT, use_cache=False).logits
        except Exception as error:  # whatever an architecture raises inside
            raise UserError(
                f"backbone: {self.config.model_type} cannot be called by its input vectors, decoder and head apart "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); known and tested are "
                f"{', '.join(sorted(LAYOUTS))} and qwen3_next"
            ) from error
        finally:
            self.train(was_training)
        if not torch.allclose(ours.float(), theirs.float(), atol=1e-2 * float(theirs.abs().max()), rtol=1e-2):
            raise UserError(
                f"backbone: {self.config.model_type} does something to its logits that Pondera does not know; "
                f"known and tested are {', '.join(sorted(LAYOUTS))} and qwen3_next"
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
        """One whole pass through the decoder by its public call; returns states after the final norm, ``[B, S, D]``.

        Args:
            h_BSD: one input vector per slot; packed into ``[1, N, D]`` if `rows` say so.
            cache: counts slots; new rows are appended to it.
            mask: none, a 2-D mask over all cached and new slots (1 = real, 0 = padding; without a cache also 1, 2, 3, ...
                for documents that must not see each other), a `SlotMask`, or one for each kind of layer.
            position_ids: ``[B, S]`` token positions; slots of one token share theirs. Packed as the inputs are.
            rows: which slots of which texts the rows of a packed call are; then `mask` must be a `SlotMask` of all texts.
            log_weight_BS: added to every attention score of that row, like `SlotMask.log_weight_BK` but as one more
                coordinate of queries and keys, which fused kernels take and gradient can flow through. Without a cache.
            attention: serves the calls of all attention layers in place of the backbone's own function.
        """
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
        """Some of the layers: ``run(h, range(0, n))`` equals `step`; a first range adds positions, a last one the norm.

        Args:
            h_BSD: inputs of the first layer of the range, ``[B, S, D]``.
            layers: a range of layer numbers with step 1.
            cache, mask, position_ids: as for `step`, without `SlotMask`.

        Raises:
            UserError: an architecture whose inside Pondera does not know.
        """
        layout = self._layout()
        decoder, count = self.decoder, self.config.num_hidden_layers
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= count:
            raise UserError(
                f"layers: {layers} is not a range within the {count} layers of this {self.config.model_type}"
            )
        if not layers:
            return h_BSD
        # An earlier range of this pass may have filled its layers already: lengths are those of this range's own layers.
        own_cache = Cache(layers=cache.layers[layers.start :]) if cache is not None else None
        if position_ids is None:
            seen = own_cache.get_seq_length() if own_cache is not None else 0
            position_ids = torch.arange(seen, seen + h_BSD.shape[1], device=h_BSD.device)[None]
        if layout.positions and layers.start == 0:
            h_BSD = h_BSD + getattr(decoder, layout.positions)(position_ids)
        masks = self._layer_masks(h_BSD, own_cache, mask, position_ids)
        types = self.layer_types
        # Once for all layers of a kind: turning takes a dozen small operations to prepare, which decoding would feel.
        arguments = {
            kind: {"attention_mask": masks[kind], layout.cache_argument: cache, "use_cache": cache is not None}
            | self._turned(kind, position_ids, h_BSD)
            for kind in {types[index] for index in layers}
        }
        for index in layers:
            h_BSD = getattr(decoder, layout.layers)[index](h_BSD, **arguments[types[index]])
        return getattr(decoder, layout.norm)(h_BSD) if layers.stop == count else h_BSD

    def _turned(self, kind: str, position_ids: Tensor, h_BSD: Tensor) -> dict[str, Any]:
        """What layers of a kind take to turn queries and keys by; nothing where positions are learned vectors."""
        rotation = self.rotation(kind, position_ids, h_BSD)
        if rotation is None:
            return {}
        return {"position_embeddings": (rotation.cos_BSr, rotation.sin_BSr), "position_ids": position_ids}

    def rotation(self, kind: str, position_ids: Tensor, h_BSD: Tensor) -> Rotary | None:
        """What queries and keys at these positions are turned by; none where positions are learned vectors in the inputs.

        Args:
            kind: of layer, as in `layer_types`: some architectures turn them differently.
            position_ids: ``[B or 1, S]``; may be negative.
            h_BSD: inputs of the call, for their dtype and device.

        Raises:
            UserError: an architecture whose inside Pondera does not know.
        """
        layout = self._layout()
        if layout.rotary is None:
            return None
        per_type = (kind,) if self.config.model_type == "gemma3_text" else ()
        return Rotary(*getattr(self.decoder, layout.rotary)(h_BSD, position_ids, *per_type))

    def more_layers(self, count: int) -> Backbone:
        """Further layers of the same architecture and a final norm, for vectors that are no tokens, newly drawn.

        They see all that came before, whatever windows the backbone's own layers have. Where positions are learned vectors,
        which stand in the inputs already, none are added again.

        Args:
            count: how many.
        """
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = count
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = ["full_attention"] * count
        else:
            config.sliding_window = None
        config.vocab_size, config.pad_token_id = 1, None  # of a table that is thrown away
        decoder: PreTrainedModel = cast(Any, type(self.decoder))(config).to(self.lm.dtype)
        if self.unit_rms:
            scaled_init(decoder)
        decoder.set_input_embeddings(nn.Identity())
        if positions := self._layout().positions:
            setattr(decoder, positions, _NoPositions())
        return Backbone(decoder)

    def _layout(self) -> Layout:
        layout = LAYOUTS.get(self.config.model_type)
        if layout is None:
            raise UserError(
                f"{self.config.model_type}: layer ranges are not mapped for this architecture, so methods that split the "
                f"stack cannot run on it; mapped: {', '.join(sorted(LAYOUTS))}. Methods that use whole passes can."
            )
        return layout

    def _layer_masks(
        self, h_BSD: Tensor, cache: Cache | None, mask: Tensor | None, position_ids: Tensor
    ) -> dict[str, Tensor | None]:
        if mask is None and cache is None:
            mask = _all_real(h_BSD)
        if mask is not None and cache is None and has_documents(mask):
            return self._masks_by_kind(h_BSD, _documents(mask))
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
            # Without a mask transformers reads position ids that do not count 0, 1, 2, ... as packed documents, and
            # slots of one token, which share a position, would each become a document of their own.
            return _all_real(h_BSD)
        if mask is not None and cache is None and has_documents(mask):
            return self._dense_masks(h_BSD, _documents(mask))
        return mask

    def _dense_masks(self, h_BSD: Tensor, mask: SlotMask | Mapping[str, SlotMask]) -> Any:
        """The 4-D masks that the decoder takes instead of building its own, one per kind of layer if it has several."""
        masks = self._masks_by_kind(h_BSD, mask)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _masks_by_kind(self, h_BSD: Tensor, mask: SlotMask | Mapping[str, SlotMask]) -> dict[str, Tensor | None]:
        kinds = set(self.layer_types)
        if "linear_attention" in kinds:
            raise UserError(
                f"{self.config.model_type}: its linear-attention layers read slots in storage order and cannot follow a "
                "mask of their own; use a method that only needs causal order, such as PonderLM2, and data.document_mask: false"
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
        """``[B, 1, S, K]``: booleans where they say all and the attention function knows them, else what to add."""
        if log_weight_BK is None and self.config._attn_implementation != "eager":
            return allowed_BSK[:, None]
        added = allowed_BSK.new_zeros(()) if log_weight_BK is None else log_weight_BK[:, None]
        return torch.where(allowed_BSK, added.to(dtype), torch.finfo(dtype).min)[:, None]


def token_positions(tokens: int, mask: Tensor | None, seen: int, device: torch.device) -> Tensor:
    """Positions ``[B or 1, T]`` of the last tokens: counted from the first token of each row's document.

    Args:
        tokens: T, new tokens.
        mask: ``[B, seen + T]`` token mask (0 = padding, else the document's number), or none.
        seen: tokens before them.

    Example:
        >>> token_positions(6, torch.tensor([[0, 1, 1, 1, 2, 2]]), 0, torch.device("cpu")).tolist()
        [[0, 0, 1, 2, 0, 1]]
    """
    if mask is None:
        return torch.arange(seen, seen + tokens, device=device)[None]
    mask_BK = mask.long()
    count_BK = (mask_BK > 0).cumsum(-1) - 1
    begins_BK = mask_BK.diff(prepend=torch.zeros_like(mask_BK[:, :1])) != 0
    start_BK = torch.where(begins_BK, count_BK, 0).cummax(-1).values
    return (count_BK - start_BK).clamp(min=0)[:, -tokens:]


def has_documents(mask: Tensor | None) -> bool:
    """Whether a token or slot mask tells several documents apart."""
    return mask is not None and mask.dtype != torch.bool and bool((mask > 1).any())


def needed(mask: Tensor | None) -> Tensor | None:
    """A token mask, or none where it says nothing: all are tokens of one document."""
    return None if mask is None or bool((mask == 1).all()) else mask


def _documents(mask_BS: Tensor) -> SlotMask:
    """Causal order within each document."""
    order_1S = torch.arange(mask_BS.shape[1], device=mask_BS.device)[None]
    allowed_BSK = within_documents(mask_BS, mask_BS) & (order_1S[:, :, None] >= order_1S[:, None, :])
    return SlotMask(allowed_BSK, order_1S, order_1S)


def within_documents(queries_BS: Tensor, keys_BK: Tensor) -> Tensor:
    """``[B, S, K]``: same document and no padding. A padding row sees its like: a softmax over nothing would be NaN."""
    return queries_BS[:, :, None] == keys_BK[:, None, :]


def _all_real(h_BSD: Tensor) -> Tensor:
    return torch.ones(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)


class _NoPositions(nn.Module):
    """Stands where an architecture looks up the vectors of its positions."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


@torch.no_grad()
def scaled_init(lm: PreTrainedModel) -> None:
    """Draws linear and embedding weights with std sqrt(2/5D), cut at 3 std; residual outputs further / sqrt(2 layers).

    Source: the initialisation of the PonderLM family's public code. With embeddings multiplied by sqrt(5D/2), token
    inputs and fed-back states both enter at about unit RMS.

    Args:
        lm: the freshly built model; changed in place.
    """
    config = lm.config.get_text_config(decoder=True)
    std = math.sqrt(2 / (5 * config.hidden_size))
    residual_outputs = ("o_proj", "out_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    for name, module in lm.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            scale = std / math.sqrt(2 * config.num_hidden_layers) if name.endswith(residual_outputs) else std
            nn.init.trunc_normal_(module.weight, std=scale, a=-3 * scale, b=3 * scale)

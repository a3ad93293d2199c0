"""AdaptiveLM: a backbone and its methods as one transformers model.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pondera.cache.identity import identity
from pondera.cache.io import load
from pondera.cache.masks import token_positions
from pondera.cache.token_cache import TokenCache
from pondera.core import spec
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.core.hf import (
    CACHE,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from pondera.core.loss_terms import LossTerm
from pondera.models.attention_mask import token_mask
from pondera.models.backbone import Backbone
from pondera.models.causal_lm import causal_lm, put_head, saved_model
from pondera.models.config import SETTINGS, AdaptiveConfig
from pondera.models.continued import embed_scale, take_over
from pondera.models.embedding import put_scale
from pondera.models.generation_settings import storable
from pondera.models.keywords import SHIFT_LABELS, check_keywords, one_cache
from pondera.models.method import Method, MethodOutput, TokenBatch, check_passes
from pondera.models.next_token import next_token_term, shifted, total_loss
from pondera.models.output import AdaptiveOutput
from pondera.models.packed_documents import documents, refuse_packed_cache
from pondera.models.self_check import bind_method, check_method
from pondera.models.transformers_hooks import TransformersHooks
from pondera.models.unsupported import NoContinuousBatching

if TYPE_CHECKING:
    from pondera.methods.chunk.base import Chunk
    from pondera.methods.head.base import Head
    from pondera.methods.kv_cache.base import KVCacheMethod
    from pondera.methods.think.base import Think

log = logging.getLogger(__name__)


class AdaptiveLM(NoContinuousBatching, TransformersHooks, PreTrainedModel, GenerationMixin):
    """A causal LM with adaptive compute and memory: any transformers backbone plus at most one method per seam.

    It supports the interfaces of a transformers causal LM: `generate` with greedy decoding, sampling, beams, streamers and
    left-padded batches, `save_pretrained`, and `AutoModelForCausalLM.from_pretrained` after this class is imported.
    Without a method its outputs equal those of the backbone bit for bit.

    Args:
        config: backbone and methods. If the backbone is a checkpoint folder, its weights are loaded. If it is another
            Pondera model, parameters with the same name and shape in both methods are loaded, too, and logged.

    Example:
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> backbone = {"model_type": "llama", "vocab_size": 97, **sizes}
        >>> model = AdaptiveLM(AdaptiveConfig(backbone=backbone, think="PonderLM2(thoughts=1)")).eval()
        >>> out = model(torch.tensor([[1, 2, 3]]))
        >>> tuple(out.logits.shape), out.passes.tolist()
        ((1, 3, 97), [[2, 2, 2]])
    """

    config_class = AdaptiveConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = []
    _said_lost = False

    def __init__(self, config: AdaptiveConfig, **unknown_settings: Any) -> None:
        if unknown_settings:  # arguments that neither `from_pretrained` nor the config uses
            raise unknown("setting", next(iter(unknown_settings)), SETTINGS)
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # tells Trainer that the model shifts the labels
        self.think: Think | None = spec.build(config.think, "think") if config.think else None
        self.chunk: Chunk | None = spec.build(config.chunk, "chunk") if config.chunk else None
        self.memory: Method | None = spec.build(config.memory, "memory") if config.memory else None
        self.kv_cache: KVCacheMethod | None = spec.build(config.kv_cache, "kv_cache") if config.kv_cache else None
        self._seam = next((seam for seam in ("think", "chunk", "memory") if getattr(self, seam) is not None), None)
        old: AdaptiveLM | None = saved_model(config._checkpoint) if config._checkpoint and config._retrofit else None
        # Trained weights no longer have unit RMS, so a new method matches its feedback to the trained embeddings, as on any
        # pretrained backbone. A trained scale is loaded with its method.
        unit_rms = config.init == "scaled" and old is None
        inner = causal_lm(config, self.think, old)
        put_head(inner, config, old)
        self.backbone = Backbone(inner, unit_rms=unit_rms)
        _check_attention(self)
        if self.backbone.lm.device.type != "meta":
            self.backbone.check_head()
        if config.embed_scale is None:
            config.embed_scale = embed_scale(self, old)
        # The embedding of a padding index gets no gradient, and the pad token is often the EOS token. A new model, whose pad
        # token is not set yet, would train that row and a resumed one would not.
        cast(nn.Embedding, self.backbone.lm.get_input_embeddings()).padding_idx = None
        put_scale(self.backbone.lm, config.embed_scale)
        if self.kv_cache is not None:
            self.kv_cache.bind(self.backbone.config)
        if self.method is not None:
            bind_method(self)
            for parameter in self.method.parameters():
                setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (else `post_init` would initialise it again)
        if config.dtype is not None:
            cast(nn.Module, self).to(config.dtype)
        lm = self.backbone.lm
        self._no_split_modules = lm._no_split_modules
        # transformers looks for tied weights in direct children only; here they are one level deeper.
        tied = lm.all_tied_weights_keys if config.tie_word_embeddings else {}
        self._tied_weights_keys = {f"backbone.lm.{key}": f"backbone.lm.{source}" for key, source in tied.items()}
        self.generation_config = storable(lm.generation_config)
        self.post_init()
        if self.backbone.lm.device.type != "meta":
            check_method(self)
        if old is not None:
            take_over(self, old)

    @property
    def method(self) -> Method | None:
        """The method that computes the hidden states, of any seam, or `None` for one pass of the backbone."""
        return None if self._seam is None else getattr(self, self._seam)

    @property
    def positions(self) -> int | None:
        """Maximum length of a sequence in tokens, or `None` if it is not limited."""
        if self.method is not None and self.method.unbounded_positions:
            return None
        return getattr(self.backbone.config, "max_position_embeddings", None)

    @property
    def embedded(self) -> int:
        """Number of token embeddings. A tokenizer can have more tokens, such as the image token of a text model."""
        return cast(Any, self.get_input_embeddings()).weight.shape[0]

    @property
    def chosen(self) -> str | None:
        """The spec string of `method`."""
        return None if self._seam is None else getattr(self.config, self._seam)

    @property
    def head(self) -> Head | None:
        """The output head that replaces the output matrix of the backbone, or `None`."""
        return cast("Head", self.get_output_embeddings()) if self.config.head else None

    def added_parameters(self) -> list[nn.Parameter]:
        """The parameters that methods add to the backbone: those of `method` and of `head`."""
        return [parameter for part in (self.method, self.head) if part is not None for parameter in part.parameters()]

    def new_cache(self) -> Cache:
        """An empty cache of the type that the method needs."""
        if self.method is not None:
            cache = self.method.new_cache(self.backbone, self.kv_cache)
            cache.methods, cache.model = self._methods, identity(self)
            return cache
        if self.kv_cache is not None:
            return self.kv_cache.cache(self.backbone.lm)
        return DynamicCache(config=self.backbone.config)

    @property
    def _methods(self) -> str:
        """The spec strings of the methods that fill a cache."""
        seam = [] if self._seam is None else [getattr(self.config, self._seam)]
        return " with ".join(seam + ([] if self.kv_cache is None else [repr(self.kv_cache)]))

    def load_cache(self, path: str | Path) -> Cache:
        """Reads a cache that its `save` has written, onto the device of the model; calls and `generate` continue from it.

        Args:
            path: the file.

        Raises:
            UserError: there is no such file, it belongs to another method or model, or this model has no method.
        """
        if not self._methods:
            raise UserError("load_cache: this model has no method, and the stock cache has no file format")
        cache = self.new_cache()
        load(cache, self._methods, path, self.device)
        return cache

    def begin_step(self, step: int, seed: int, progress: float = 1.0) -> None:
        """Announces an optimizer step to the method, so that all ranks make the same random choices."""
        if self.method is not None:
            self.method.begin_step(step, seed, progress)

    def passes(self) -> float:
        """Mean passes per token at inference."""
        return self.method.passes() if self.method is not None else 1.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        effort: str | float | None = None,
        max_passes: int | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        passes: Tensor | None = None,
        **kwargs: Any,
    ) -> AdaptiveOutput:
        """Computes logits, and the loss if labels are given.

        Args:
            input_ids: ``[B, T]`` token ids; alternative to `inputs_embeds`.
            attention_mask: ``[B, seen + T]`` over tokens (not KV slots), 1 = real, 0 = padding.
            position_ids: ``[B, T]`` token positions; default: `None`. A model with a method then counts from the first real
                token of each sequence; one without a method counts as its backbone does, padding included. Without a mask
                and a cache, a document starts where a position is not the previous one plus 1, and attention is limited to
                the document.
            past_key_values: a cache from `new_cache` or an earlier call.
            inputs_embeds: ``[B, T, D]`` instead of `input_ids`.
            labels: ``[B, T]``, same as `input_ids`; shifted here. -100 is ignored.
            use_cache: return a cache.
            logits_to_keep: number of last positions to compute logits for, or indices of positions.
            effort: compute per token, ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
            max_passes: maximum number of passes per token; default: `None`, no limit.
            document_ids: ``[B, T]``, 1, 2, 3, ...: attention is limited to tokens of the same document. Needs no cache.
            cache: name of `past_key_values` in transformers since 5.24.
            num_items_in_batch: number of labels in the whole optimizer step; the loss is then the share of this call in the
                loss of the step.
            return_dict: `False` returns a tuple.
            passes: ``[B, T]``, the number of passes that each token takes, at most those of the method; default: `None`, the
                method decides.
            kwargs: ``shift_labels``, ``[B, T]``, the next token of each input, not shifted again; and keywords that
                transformers passes to every model.

        Raises:
            UserError: an unknown keyword, or an argument that the method or the backbone does not support.
        """
        shift_labels = kwargs.pop(SHIFT_LABELS, None)
        check_keywords(kwargs, _PARAMETERS, position_ids is not None)
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = self.new_cache()
        if labels is not None and shift_labels is None:
            shift_labels = shifted(labels)
        tokens = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
        found = self.states(*tokens, shift_labels, self._budget(effort, max_passes), document_ids, passes)
        out = self._output(found, cache, logits_to_keep, shift_labels, num_items_in_batch)
        return cast(AdaptiveOutput, out.to_tuple()) if return_dict is False else out

    def _output(
        self,
        found: MethodOutput,
        cache: Cache | None,
        logits_to_keep: int | Tensor,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> AdaptiveOutput:
        """Logits, and the loss if labels are given, from the states after all passes; arguments as for `forward`."""
        h_BTD, loss, terms = found.h_BTD, None, found.terms
        if isinstance(logits_to_keep, Tensor):
            h_BTD = h_BTD[:, logits_to_keep]
        elif logits_to_keep:
            h_BTD = h_BTD[:, -logits_to_keep:]
        logits_BTV = None if shift_labels is not None and self._head_has_loss(found) else self.backbone.head(h_BTD)
        if shift_labels is not None:
            terms = self._terms(found, h_BTD, logits_BTV, shift_labels)
            loss = total_loss(terms, num_items_in_batch)
        elif terms and self.training:
            self._warn_lost(terms)
        out = AdaptiveOutput(loss, logits_BTV, passes=found.passes_BT, **cast(Any, {CACHE: cache}))
        if self.training:
            out["terms"], out["trace"] = terms, found.trace
        else:
            out.__dict__.update(terms=terms, trace=found.trace)
        out.__dict__.update({"cache": cache, CACHE: cache})
        return out

    def _budget(self, effort: str | float | None, max_passes: int | None) -> Effort:
        budget = Effort.of(effort, max_passes)
        if self._seam is None and budget != FULL:
            name = "max_passes" if effort is None else "effort"
            raise UserError(f"{name}: this model always runs one pass per token; leave it out")
        return budget

    def _head_has_loss(self, found: MethodOutput) -> bool:
        """Whether the head computes the next-token loss itself, without logits."""
        return self.training and self.head is not None and self.backbone.plain_logits and found.deferred_loss is None

    def _terms(
        self, found: MethodOutput, h_BTD: Tensor, logits_BTV: Tensor | None, shift_labels: Tensor
    ) -> dict[str, LossTerm]:
        """All loss terms of a call, the next-token loss first."""
        if logits_BTV is None:
            return {"next_token": cast("Head", self.head).term(h_BTD, shift_labels), **found.terms}
        deferred = {} if found.deferred_loss is None else found.deferred_loss(logits_BTV, shift_labels)
        return {"next_token": next_token_term(logits_BTV, shift_labels), **found.terms, **deferred}

    def _warn_lost(self, terms: dict[str, LossTerm]) -> None:
        if not self._said_lost:
            self._said_lost = True
            log.warning(
                "no labels in training: %s of %s are in out.terms but not in a loss", ", ".join(terms), self.chosen
            )

    def states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels_BT: Tensor | None = None,
        budget: Effort = FULL,
        document_ids: Tensor | None = None,
        passes_BT: Tensor | None = None,
    ) -> MethodOutput:
        """Final hidden states after all passes, with the loss terms and records of the method.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, document_ids: as for `forward`.
            labels_BT: the next token of each, if known.
            budget: compute per token.
            passes_BT: as `passes` for `forward`.
        """
        h_BTD = self.backbone.embed(cast(Tensor, input_ids)) if inputs_embeds is None else inputs_embeds
        if 0 in h_BTD.shape[:2]:
            raise UserError(
                f"input_ids: {h_BTD.shape[0]} sequences of {h_BTD.shape[1]} tokens; give at least one token"
            )
        if position_ids is not None and attention_mask is None and document_ids is None:
            if cache is None:
                document_ids = documents(position_ids.expand(h_BTD.shape[0], -1))
            else:
                refuse_packed_cache(position_ids)
        if document_ids is not None:
            if cache is not None:
                raise UserError("document_ids: not supported with a cache; leave past_key_values out")
            attention_mask = document_ids
        method = self.method
        if passes_BT is not None:
            check_passes(passes_BT, h_BTD, method)
        if attention_mask is not None:
            seen = cache.get_seq_length() if cache is not None else 0
            attention_mask = token_mask(attention_mask, h_BTD.shape[0], h_BTD.shape[1], seen, self.chosen)
        if position_ids is None and (method is not None or document_ids is not None):
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = token_positions(h_BTD.shape[1], attention_mask, seen, h_BTD.device)
        if method is None or position_ids is None:
            h_BTD = self.backbone.step(h_BTD, cache, attention_mask, position_ids)
            return MethodOutput(h_BTD, torch.ones(h_BTD.shape[:2], dtype=torch.long, device=h_BTD.device))
        if cache is not None and not isinstance(cache, TokenCache):
            raise UserError(
                f"past_key_values: a {type(cache).__name__} does not support the method of this model; pass model.new_cache()"
            )
        batch = TokenBatch(h_BTD, position_ids, cache, attention_mask, budget, labels_BT, input_ids, passes_BT)
        if cache is None:
            return method(self.backbone, batch)
        with cache.call():
            return method(self.backbone, batch)


def _check_attention(model: AdaptiveLM) -> None:
    """Refuses attention kernels that a model with a method cannot use."""
    kernel = model.backbone.config._attn_implementation
    if model.method is not None and kernel not in (None, "sdpa", "eager"):
        raise UserError(
            f"attn_implementation: {kernel!r} treats KV slots of equal position as packed documents, or takes no custom "
            "mask; a model with a method needs 'sdpa' (also fused on GPUs) or 'eager'"
        )


_PARAMETERS = list(inspect.signature(AdaptiveLM.forward).parameters)

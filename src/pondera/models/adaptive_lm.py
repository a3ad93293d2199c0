"""AdaptiveLM: a backbone and the methods chosen for it, as one transformers model.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.cache.token_cache import TokenCache
from pondera.core import spec
from pondera.core.effort import FULL, Effort
from pondera.core.errors import UserError, unknown
from pondera.core.hf import (
    CACHE,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    ModelOutput,
    PreTrainedConfig,
    PreTrainedModel,
)
from pondera.core.loss_terms import LossTerm
from pondera.models.backbone import Backbone, scaled_init, token_positions
from pondera.models.config import SETTINGS, AdaptiveConfig
from pondera.models.embedding import put_scale
from pondera.models.foreign_forward import BaseModel, watch_forward
from pondera.models.generation_settings import storable
from pondera.models.keywords import SHIFT_LABELS, check_keywords
from pondera.models.method import Method, MethodOutput
from pondera.models.packed_documents import documents, refuse_packed_cache
from pondera.models.self_check import bind_method, check_method
from pondera.models.unsupported import NoContinuousBatching

if TYPE_CHECKING:
    from pondera.methods.chunk.base import Chunk
    from pondera.methods.head.base import Head
    from pondera.methods.kv_cache.base import KVCacheMethod
    from pondera.methods.think.base import Think

IGNORED = -100
"""Label of tokens that carry no loss, as in transformers."""

log = logging.getLogger(__name__)


@dataclass
class AdaptiveOutput(ModelOutput):
    """What `AdaptiveLM` returns.

    As a mapping it holds what there is of `loss`, `logits`, `passes` and the cache, under the name that the installed
    transformers gives it; in training also `terms` and `trace`. Out of training these two are attributes alone:
    what holds anything but tensors could not be gathered from several processes.

    Args:
        loss: the weighted sum of the terms' means, if labels were given.
        logits: ``[B, T, V]``; none in training where a head has its loss without them.
        cache: the KV cache, if one was used; `past_key_values` is the same.
        passes: ``[B, T]``, passes that each token got.
        terms: loss terms as sums and counts, by name.
        trace: what the method recorded.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    cache: Cache | None = None
    passes: Tensor | None = None
    terms: dict[str, LossTerm] | None = None
    trace: dict[str, Any] | None = None


class AdaptiveLM(NoContinuousBatching, PreTrainedModel, GenerationMixin):
    """A causal LM that weighs each token: any transformers backbone plus at most one method per seam.

    Everything that transformers does with a causal LM works: `generate` with greedy, sampling, beams, streamers and
    left-padded batches, `save_pretrained`, and `AutoModelForCausalLM.from_pretrained` once this class is imported.
    With nothing chosen it equals its backbone bit for bit.

    Args:
        config: what it is made of. A config made from a checkpoint folder loads that checkpoint's weights; of another
            Pondera model also what the two methods share, and a line of the log says what came from there.

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
    _said_frozen = False
    _said_lost = False

    def __init__(self, config: AdaptiveConfig, **unknown_settings: Any) -> None:
        if unknown_settings:  # what `from_pretrained` was given and neither it nor the config knows
            raise unknown("setting", next(iter(unknown_settings)), SETTINGS)
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # by which Trainer knows that labels are shifted here, and counts them so
        self.think: Think | None = spec.build(config.think, "think") if config.think else None
        self.chunk: Chunk | None = spec.build(config.chunk, "chunk") if config.chunk else None
        self.memory: Method | None = spec.build(config.memory, "memory") if config.memory else None
        self.kv_cache: KVCacheMethod | None = spec.build(config.kv_cache, "kv_cache") if config.kv_cache else None
        self._seam = next((seam for seam in ("think", "chunk", "memory") if getattr(self, seam) is not None), None)
        old: AdaptiveLM | None = _saved_model(config._checkpoint) if config._checkpoint and config._retrofit else None
        # Training moves weights away from the unit RMS that they were drawn at, so what a new method feeds back is matched
        # to trained embeddings as on any pretrained backbone; a scale that was trained with comes along with its method.
        unit_rms = config.init == "scaled" and old is None
        inner = _causal_lm(config, self.think, old)
        _put_head(inner, config, old)
        self.backbone = Backbone(inner, unit_rms=unit_rms)
        self._check_attention()
        if self.backbone.lm.device.type != "meta":
            self.backbone.check_head()
        if config.embed_scale is None:
            config.embed_scale = self._embed_scale(old)
        # A row of the table that training knows as padding stays as it is for ever, and the pad token is often the one that
        # ends texts; a fresh model, whose pad token is not known yet, would learn it and a resumed one would not.
        cast(nn.Embedding, self.backbone.lm.get_input_embeddings()).padding_idx = None
        put_scale(self.backbone.lm, config.embed_scale)
        if self.kv_cache is not None:
            self.kv_cache.bind(self.backbone.config)
        if self.method is not None:
            bind_method(self)
            for parameter in self.method.parameters():
                setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (by the method; `post_init` would draw it anew)
        if config.dtype is not None:
            cast(nn.Module, self).to(config.dtype)
        lm = self.backbone.lm
        self._no_split_modules = lm._no_split_modules
        # transformers looks for tied weights in direct children only, and ours lie one level deeper.
        tied = lm.all_tied_weights_keys if config.tie_word_embeddings else {}
        self._tied_weights_keys = {f"backbone.lm.{key}": f"backbone.lm.{source}" for key, source in tied.items()}
        self.generation_config = storable(lm.generation_config)
        self.post_init()
        if self.backbone.lm.device.type != "meta":
            check_method(self)
        if old is not None:
            self._take_over(old)

    def _take_over(self, old: AdaptiveLM) -> None:
        """What else an old model knows: where a text ends, and what its method has under the names and shapes of ours."""
        self.generation_config = old.generation_config
        mine, theirs = ({} if lm.method is None else lm.method.state_dict() for lm in (self, old))
        shared = {name: theirs[name] for name in theirs if name in mine and mine[name].shape == theirs[name].shape}
        if self.method is not None:
            self.method.load_state_dict(shared, strict=False)
        said = [sorted(names) for names in (shared, mine.keys() - shared, theirs.keys() - shared)]
        log.info(
            "%s: taken over: its backbone (%d tensors), of its method %s; new: %s; left out: %s",
            self.config._checkpoint,
            len(old.backbone.lm.state_dict()),
            *(", ".join(names) or "nothing" for names in said),
        )

    def _check_attention(self) -> None:
        kernel = self.backbone.config._attn_implementation
        if self.method is not None and kernel not in (None, "sdpa", "eager"):
            raise UserError(
                f"attn_implementation: {kernel!r} reads slots that share a position as packed documents, or takes no mask "
                "of ours; models with a method need 'sdpa' (fused kernels on GPUs all the same) or 'eager'"
            )

    def _embed_scale(self, old: AdaptiveLM | None) -> float:
        if old is not None:
            return cast(float, old.config.embed_scale)
        if self.config.init != "scaled":
            return 1.0
        width = self.backbone.config.hidden_size
        own = float(getattr(self.backbone.lm.get_input_embeddings(), "embed_scale", 1.0))
        return (self.method.embed_scale(width) if self.method is not None else (2.5 * width) ** 0.5) / own

    @property
    def method(self) -> Method | None:
        """What makes states of embeddings, on whichever seam; none: the backbone alone, in one pass."""
        return None if self._seam is None else getattr(self, self._seam)

    @property
    def positions(self) -> int | None:
        """How many tokens a text may have; none: any number."""
        if self.method is not None and self.method.unbounded_positions:
            return None
        return getattr(self.backbone.config, "max_position_embeddings", None)

    @property
    def embedded(self) -> int:
        """How many tokens the model embeds. A tokenizer may have more, such as the image token of a text model."""
        return cast(Any, self.get_input_embeddings()).weight.shape[0]

    @property
    def chosen(self) -> str | None:
        """What `method` was built from."""
        return None if self._seam is None else getattr(self.config, self._seam)

    @property
    def head(self) -> Head | None:
        """What scores the vocabulary in place of the backbone's output matrix; none: that matrix."""
        return cast("Head", self.get_output_embeddings()) if self.config.head else None

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.backbone.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's token embeddings."""
        self.backbone.lm.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The backbone's decoder, without its head."""
        return self.backbone.decoder

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's head."""
        return cast(nn.Module, self.backbone.lm.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's head."""
        self.backbone.lm.set_output_embeddings(value)

    def new_cache(self) -> Cache:
        """An empty cache, of the method's own kind where there is one."""
        if self.method is not None:
            return self.method.new_cache(self.backbone, self.kv_cache)
        if self.kv_cache is not None:
            return self.kv_cache.cache(self.backbone.lm)
        return DynamicCache(config=self.backbone.config)

    def begin_step(self, step: int, seed: int) -> None:
        """Tells the method which optimizer step comes, so that all ranks draw the same."""
        if self.method is not None:
            self.method.begin_step(step, seed)

    def passes(self) -> float:
        """Passes per token at inference, on average."""
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
        **kwargs: Any,
    ) -> AdaptiveOutput:
        """Logits, and the loss if labels are given.

        Args:
            input_ids: ``[B, T]`` token ids; or give `inputs_embeds`.
            attention_mask: ``[B, seen + T]`` over tokens (not slots), 1 = real, 0 = padding.
            position_ids: ``[B, T]`` token positions; none: counted from each row's first real token. Without a mask and a
                cache, a document begins wherever they do not go on by one, and sees no other.
            past_key_values: a cache from `new_cache` or an earlier call.
            inputs_embeds: ``[B, T, D]`` instead of `input_ids`.
            labels: ``[B, T]``, as `input_ids`; shifted here. -100 carries no loss.
            use_cache: return a cache.
            logits_to_keep: only the last so many positions, or these positions.
            effort: how much thinking is wanted, ``"low"``, ``"medium"``, ``"high"`` or a number from 0 (one pass) to 1.
            max_passes: no token gets more passes.
            document_ids: ``[B, T]``, 1, 2, 3, ...: tokens of different documents do not see each other. Without a cache.
            cache: `past_key_values`, as transformers calls it since 5.24.
            num_items_in_batch: labels of the whole optimizer step, of which this call is a part: the loss is this part's
                share of the step's.
            return_dict: `False` gives a tuple.
            kwargs: ``shift_labels``, ``[B, T]``: the token after each input; not shifted. And what transformers passes to
                every model, if it asks for nothing that is not there.

        Raises:
            UserError: an unknown keyword, or what a method or the backbone cannot do.
        """
        shift_labels = None
        if kwargs:
            shift_labels = kwargs.pop(SHIFT_LABELS, None)
            check_keywords(kwargs, _PARAMETERS, position_ids is not None)
        if cache is None:
            cache = past_key_values
        elif past_key_values is not None and past_key_values is not cache:
            raise UserError("cache and past_key_values are two names of one thing, and two caches were given; give one")
        if cache is None and use_cache:
            cache = self.new_cache()
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        thought = self.states(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            shift_labels,
            Effort.of(effort, max_passes) if self._seam else FULL,
            document_ids,
        )
        h_BTD, terms = thought.h_BTD, thought.terms
        if isinstance(logits_to_keep, Tensor):
            h_BTD = h_BTD[:, logits_to_keep]
        elif logits_to_keep:
            h_BTD = h_BTD[:, -logits_to_keep:]
        loss, logits_BTV = None, None
        by_head = (
            self.training and self.head is not None and self.backbone.plain_logits and thought.deferred_loss is None
        )
        if shift_labels is None or not by_head:
            logits_BTV = self.backbone.head(h_BTD)
        if shift_labels is not None:
            if logits_BTV is None:
                next_token = cast("Head", self.head).term(h_BTD, shift_labels)
            else:
                next_token = next_token_term(logits_BTV, shift_labels)
            deferred = (
                thought.deferred_loss(logits_BTV, shift_labels)
                if thought.deferred_loss is not None and logits_BTV is not None
                else {}
            )
            terms = {"next_token": next_token, **terms, **deferred}
            loss = torch.stack([term.weight * term.mean() for term in terms.values()]).sum()
            if num_items_in_batch is not None:
                loss = loss * (
                    next_token.count / torch.as_tensor(num_items_in_batch, device=loss.device).reshape(-1)[0]
                )
        elif terms and self.training and not self._said_lost:
            self._said_lost = True
            log.warning(
                "no labels in training: %s of %s are in out.terms and in no loss", ", ".join(terms), self.chosen
            )
        out = AdaptiveOutput(loss, logits_BTV, passes=thought.passes_BT, **cast(Any, {CACHE: cache}))
        if self.training:
            out["terms"], out["trace"] = terms, thought.trace
        else:
            out.__dict__.update(terms=terms, trace=thought.trace)
        out.__dict__.update(cache=cache, past_key_values=cache)
        return cast(AdaptiveOutput, out.to_tuple()) if return_dict is False else out

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
    ) -> MethodOutput:
        """What the head makes logits of, after all thinking, and what was lost and recorded on the way.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, document_ids: as for `forward`.
            labels_BT: the token after each, where it is known.
            budget: how much thinking is wanted.
        """
        h_BTD = self.backbone.embed(cast(Tensor, input_ids)) if inputs_embeds is None else inputs_embeds
        if position_ids is not None and attention_mask is None and document_ids is None:
            if cache is None:
                document_ids = documents(position_ids.expand(h_BTD.shape[0], -1))
            else:
                refuse_packed_cache(position_ids)
        if document_ids is not None:
            if cache is not None:
                raise UserError("document_ids: documents are told apart in training only; leave past_key_values out")
            attention_mask = document_ids
        method = self.method
        if position_ids is None and (method is not None or document_ids is not None):
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = token_positions(h_BTD.shape[1], attention_mask, seen, h_BTD.device)
        if method is None or position_ids is None:
            h_BTD = self.backbone.step(h_BTD, cache, attention_mask, position_ids)
            return MethodOutput(h_BTD, torch.ones(h_BTD.shape[:2], dtype=torch.long, device=h_BTD.device))
        if cache is not None and not isinstance(cache, TokenCache):
            raise UserError(
                f"past_key_values: a {type(cache).__name__} cannot hold what this model keeps; pass model.new_cache()"
            )
        return method(self.backbone, h_BTD, position_ids, cache, attention_mask, budget, labels_BT)

    @property
    def base_model(self) -> Any:
        """For trainers that apply the output matrix themselves: called, it gives final states, after all thinking."""
        return BaseModel(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module; where someone lays a forward of their own over ours, what it loses of the loss is put back."""
        if name == "forward":
            watch_forward(self)
        super().__setattr__(name, value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **more: Any
    ) -> None:
        """transformers asks here for activation checkpointing: refused, left out or done, as the method can bear."""
        method = self.method
        if enable and method is not None:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
                raise UserError(
                    f"use_reentrant: {self.chosen} hands its layers tensors that reentrant checkpointing passes no gradient "
                    'to; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            if not method.supports_recompute:
                log.warning(
                    "gradient_checkpointing: left out. %s reads the rows of its earlier steps from a cache, which cannot be "
                    "recomputed; it trains the same without, in more memory (a smaller batch takes less)",
                    self.chosen,
                )
                return
        cast(Any, super())._set_gradient_checkpointing(enable, gradient_checkpointing_func, **more)

    def train(self, mode: bool = True) -> Self:
        """As any module; says so where an adapter trains and what the method has of its own is frozen."""
        super().train(mode)
        method = self.method
        # An adapter that trains a copy of the method (modules_to_save) wraps the frozen original.
        if mode and method is not None and not self._said_frozen and not hasattr(method, "original_module"):
            frozen = sum(not parameter.requires_grad for parameter in method.parameters())
            if frozen and any(parameter.requires_grad for parameter in self.parameters()):
                self._said_frozen = True
                log.warning(
                    "%d of the weights of %s are frozen while others train, as adapters freeze all that they do not know; to "
                    "train them, too, use LoraConfig(..., modules_to_save=[%r])",
                    frozen,
                    self.chosen,
                    self._seam,
                )
        return self

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate` asks here for its cache; a method needs one that counts tokens and slots apart."""
        if self.method is None and self.kv_cache is None:
            cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise UserError(
                    f"cache_implementation={generation_config.cache_implementation!r}: a model with a method or a memory "
                    "brings its own cache; leave cache_implementation out"
                )
            model_kwargs[CACHE] = self.new_cache()


def next_token_term(logits_BTV: Tensor, shift_labels_BT: Tensor) -> LossTerm:
    """Cross-entropy of each next token, in float32, as a sum and a count of the labels that are not -100."""
    flat = shift_labels_BT.reshape(-1).to(logits_BTV.device)
    total = F.cross_entropy(logits_BTV.float().flatten(0, 1), flat, ignore_index=IGNORED, reduction="sum")
    return LossTerm(total, (flat != IGNORED).sum())


def _causal_lm(config: AdaptiveConfig, think: Think | None, old: AdaptiveLM | None) -> PreTrainedModel:
    """The transformers model inside: that of an old model, loaded from its checkpoint, or built and initialised."""
    backbone = cast(PreTrainedConfig, config.backbone)
    window = getattr(backbone, "sliding_window", None)
    if think is not None and think.interleaved and window:
        backbone = type(backbone).from_dict(backbone.to_dict())
        backbone.sliding_window = window * think.slots_per_token
        backbone._attn_implementation = cast(PreTrainedConfig, config.backbone)._attn_implementation
    if old is not None:  # its weights, in a model whose windows are as wide as the new method needs
        lm = old.backbone.lm
        known = {
            name: tensor for name, tensor in lm.state_dict().items() if not old.config.head or ".table" not in name
        }
        return type(lm).from_pretrained(None, config=backbone, state_dict=known, dtype=config.dtype or lm.dtype)
    if config._checkpoint is not None:
        return _saved_model(config._checkpoint, config=backbone)
    lm = AutoModelForCausalLM.from_config(backbone)
    if config.init == "scaled":
        scaled_init(lm)
    return lm


def _put_head(lm: PreTrainedModel, config: AdaptiveConfig, old: AdaptiveLM | None) -> None:
    """Puts the chosen head in the place of a causal LM's output matrix; of an old model the same head goes on."""
    if old is not None and old.config.head:
        config.head = config.head or old.config.head
        if config.head != old.config.head:
            raise UserError(
                f"head: {config.head}: the model it goes on from scores its vocabulary by {old.config.head}, and has no output "
                "matrix to make another head from; leave head out"
            )
        lm.set_output_embeddings(old.backbone.lm.get_output_embeddings())
        return
    if not config.head:
        return
    if getattr(lm.config, "tie_word_embeddings", False):
        raise UserError(
            f"head: {config.head} takes the place of an output matrix, which is tied to the embeddings here; use "
            "tie_word_embeddings: false in the backbone"
        )
    matrix, head = cast(nn.Linear, lm.get_output_embeddings()), cast("Head", spec.build(config.head, "head"))
    trained = config._checkpoint is not None
    head.bind(matrix.out_features, matrix.in_features, matrix.weight if trained else None)
    for parameter in head.parameters():
        setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 (by the head; `post_init` would draw it anew)
    lm.set_output_embeddings(head)


def _saved_model(path: str, **options: Any) -> Any:
    """The causal LM of a checkpoint, with every weight that its config asks for."""
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its weights cannot be loaded: {str(error).splitlines()[0]}") from error
    lm, info = loading
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{path}: its weights are not all there: missing {', '.join(missing[:3])}{more}; give a folder whose files "
            "belong to one checkpoint"
        )
    if unused := sorted(info["unexpected_keys"]):
        log.info("%s: left out, as its config has no place for them: %s", path, ", ".join(unused))
    return lm


_PARAMETERS = list(inspect.signature(AdaptiveLM.forward).parameters)

"""What transformers calls on a model: embeddings, gradient checkpointing, training mode, trainers' forwards, and `generate`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Self, cast

from torch import nn

from pondera.cache.layer import begin_generate
from pondera.core.errors import UserError
from pondera.core.hf import CACHE, GenerationConfig
from pondera.models.foreign_forward import BaseModel, watch_forward

if TYPE_CHECKING:
    from pondera.core.hf import Cache
    from pondera.methods.kv_cache.base import KVCacheMethod
    from pondera.models.backbone import Backbone
    from pondera.models.method import Method

log = logging.getLogger(__name__)


class TransformersHooks(nn.Module):
    """The part of `AdaptiveLM` that overrides what transformers calls; it comes before transformers' classes in the order of
    its bases."""

    _said_frozen: bool = False

    if TYPE_CHECKING:  # what `AdaptiveLM` has
        backbone: Backbone
        kv_cache: KVCacheMethod | None
        _seam: str | None

        @property
        def method(self) -> Method | None: ...
        @property
        def chosen(self) -> str | None: ...
        def new_cache(self) -> Cache: ...

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the backbone."""
        return self.backbone.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the backbone."""
        self.backbone.lm.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The decoder of the backbone, without its head."""
        return self.backbone.decoder

    def get_output_embeddings(self) -> nn.Module:
        """The head of the backbone."""
        return cast(nn.Module, self.backbone.lm.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head of the backbone."""
        self.backbone.lm.set_output_embeddings(value)

    @property
    def base_model(self) -> Any:
        """For trainers that apply the output matrix themselves: a callable that returns the final hidden states."""
        return BaseModel(cast(Any, self))

    def __setattr__(self, name: str, value: Any) -> None:
        """Like `nn.Module`; if a trainer replaces `forward`, hooks keep the loss terms of the method."""
        if name == "forward":
            watch_forward(self)
        super().__setattr__(name, value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **more: Any
    ) -> None:
        """Called by transformers to enable activation checkpointing; raises or ignores it if the method does not support it."""
        method = self.method
        if enable and method is not None:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
                raise UserError(
                    f"use_reentrant: {self.chosen} passes tensors to its layers that get no gradient with reentrant "
                    'checkpointing; use gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            if not method.supports_recompute:
                log.warning(
                    "gradient_checkpointing: ignored. %s reads KV slots of earlier steps from a cache, which cannot be "
                    "recomputed; training is the same without it, but needs more memory (use a smaller batch)",
                    self.chosen,
                )
                return
        cast(Any, super())._set_gradient_checkpointing(enable, gradient_checkpointing_func, **more)

    def train(self, mode: bool = True) -> Self:
        """Like `nn.Module`; warns if an adapter trains while parameters of the method are frozen."""
        super().train(mode)
        method = self.method
        # An adapter that trains a copy of the method (modules_to_save) wraps the frozen original.
        if mode and method is not None and not self._said_frozen and not hasattr(method, "original_module"):
            frozen = sum(not parameter.requires_grad for parameter in method.parameters())
            if frozen and any(parameter.requires_grad for parameter in self.parameters()):
                self._said_frozen = True
                log.warning(
                    "%d parameters of %s are frozen while others train, because adapters freeze all other parameters; to "
                    "train them, too, use LoraConfig(..., modules_to_save=[%r])",
                    frozen,
                    self.chosen,
                    self._seam,
                )
        return self

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by `generate` to create a cache; a method needs one that counts tokens and KV slots separately."""
        if self.method is None and self.kv_cache is None:
            cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise UserError(
                    f"cache_implementation={generation_config.cache_implementation!r}: a model with a method "
                    "creates its own cache; leave cache_implementation out"
                )
            model_kwargs[CACHE] = self.new_cache()
        elif model_kwargs.get(CACHE) is not None:
            begin_generate(model_kwargs[CACHE])

"""Support for trainers that replace `forward` and apply the output matrix themselves (such as those of TRL).

Such a forward calls `model.base_model` for the last hidden states and computes a log-probability per label. It gets the
states after all passes of the method. The loss terms of the method are added as gradients of these log-probabilities, so
training is complete.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.core.errors import UserError
from pondera.core.hf import ModelOutput
from pondera.models.keywords import SHIFT_LABELS, check_keywords

if TYPE_CHECKING:
    from pondera.models.adaptive_lm import AdaptiveLM


@dataclass
class _States(ModelOutput):
    last_hidden_state: Tensor | None = None


class BaseModel:
    """The `base_model` of an `AdaptiveLM`: called like a decoder, it returns hidden states for the head.

    Args:
        model: the whole model.
    """

    def __init__(self, model: AdaptiveLM) -> None:
        self._model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Returns final hidden states as ``last_hidden_state``, ``[B, T, D]``.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs: as for `AdaptiveLM.forward`.
            use_cache: not supported.
        """
        model, own = self._model, self._model.__dict__
        if use_cache:
            raise UserError(
                "use_cache: base_model returns hidden states for training; call the model itself for a cache"
            )
        check_keywords(
            kwargs, ["input_ids", "attention_mask", "position_ids", "inputs_embeds"], position_ids is not None
        )
        labels_BT = own.get("_labels_of_call")
        thought = model.states(input_ids, attention_mask, position_ids, None, inputs_embeds, labels_BT)
        terms = dict(thought.terms)
        if thought.deferred_loss is not None and labels_BT is not None:
            terms |= thought.deferred_loss(model.backbone.head(thought.h_BTD), labels_BT)
        if torch.is_grad_enabled() and terms:
            own["_terms_of_call"] = {name: term.weight * term.mean() for name, term in terms.items()}
        return _States(last_hidden_state=thought.h_BTD)


def watch_forward(model: nn.Module) -> None:
    """Registers hooks on a model whose forward was replaced, to keep labels and loss terms."""
    if "_watched" not in model.__dict__:
        model.__dict__["_watched"] = True
        model.register_forward_pre_hook(_note_labels, with_kwargs=True)
        model.register_forward_hook(_carry_terms)


def _note_labels(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    labels_BT, shifted_BT = kwargs.get("labels"), kwargs.get(SHIFT_LABELS)
    if shifted_BT is None and labels_BT is not None:
        shifted_BT = F.pad(labels_BT, (0, 1), value=-100)[:, 1:]
    model.__dict__["_labels_of_call"] = shifted_BT


def _carry_terms(model: nn.Module, args: Any, output: Any) -> None:
    model.__dict__.pop("_labels_of_call", None)
    terms = model.__dict__.pop("_terms_of_call", None)
    if terms is None:
        return
    if getattr(output, "log_probs", None) is None:
        raise UserError(
            f"base_model: a loss on these hidden states misses the loss terms of the method ({', '.join(terms)}); train with "
            "`pondera train`, transformers' Trainer or TRL's SFTTrainer"
        )
    output.log_probs = _Carry.apply(output.log_probs, torch.stack(list(terms.values())).sum(), ", ".join(terms))


class _Carry(torch.autograd.Function):
    """Returns log-probabilities unchanged; the backward pass adds the gradient of the loss terms, weighted like the tokens.

    A loss that divides the sum of -log p by the N tokens of a whole step gives each token a gradient of -1/N. The negative
    sum of these gradients is the share of the tokens of the step that are in this call, which is the weight of the mean of a
    term in the mean of the step.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, terms: Tensor, names: str) -> Tensor:
        ctx.names = names
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grads[0]
        if bool((grad > 0).any()):
            raise UserError(
                f"this loss decreases the probability of some tokens, so the weight of the method's loss terms "
                f"({ctx.names}) is not defined; use a method without loss terms (pondera methods), or transformers' Trainer"
            )
        return grad, -grad.sum(), None

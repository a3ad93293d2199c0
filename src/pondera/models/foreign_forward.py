"""Trainers that lay a forward of their own over a model's and apply the output matrix themselves (TRL's do).

Such a forward calls `model.base_model` for the last hidden states and turns them into a log-probability per label. What it
gets here are the states after all of the method's thinking, and the method's own loss terms come along as gradients of
those log-probabilities, so that nothing of the training is left out.

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
    """What an `AdaptiveLM` has for `base_model`: called like a decoder, it answers with states that are ready for the head.

    Args:
        model: the whole.
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
        """Final states as ``last_hidden_state``, ``[B, T, D]``.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs: as for `AdaptiveLM.forward`.
            use_cache: no.
        """
        model, own = self._model, self._model.__dict__
        if use_cache:
            raise UserError("use_cache: base_model gives states for training; call the model itself to get a cache")
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
    """Has the calls of a model watched from now on, as someone has laid a forward over its own."""
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
            f"base_model: the loss made of these states leaves out the method's own terms ({', '.join(terms)}); train with "
            "`pondera train`, transformers' Trainer or TRL's SFTTrainer"
        )
    output.log_probs = _Carry.apply(output.log_probs, torch.stack(list(terms.values())).sum(), ", ".join(terms))


class _Carry(torch.autograd.Function):
    """Log-probabilities as they are, and in the backward pass the method's terms, weighted as these tokens are.

    A loss that divides the sum of -log p by the number of tokens of a whole step gives each token a gradient of -1 over that
    number. Minus the sum of these gradients is the share of the step's tokens that are in this call, and so the weight that
    the mean of a term has in the step's mean.
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
                f"this loss makes some tokens less likely, and says nothing of how much the method's own terms ({ctx.names}) "
                "count beside it; train so with a method that has none (pondera methods), or with transformers' Trainer"
            )
        return grad, -grad.sum(), None

"""Activation checkpointing, switched on from outside: right, left out aloud, or refused."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.trained_methods import METHODS

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import checkpoint_activations, is_checkpointing


def grads(reentrant: bool | None, **chosen) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **chosen)).train()
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
        model.enable_input_require_grads()
    torch.manual_seed(1)
    model.begin_step(0, 0)
    x = ids(2, 9)
    model(x, labels=x).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_model_has_the_same_gradients(reentrant: bool):
    torch.testing.assert_close(grads(reentrant), grads(None))


@pytest.mark.parametrize(("seam", "name"), METHODS)
def test_every_method_has_the_same_gradients_or_refuses(seam: str, name: str, caplog):
    chosen = {seam: f"{name}()"}
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(grads(False, **chosen), grads(None, **chosen))
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **chosen))
    checkpoint_activations(model)
    assert is_checkpointing(model) == model.method.supports_recompute
    assert ("cannot be recomputed" in caplog.text) != model.method.supports_recompute
    with pytest.raises(UserError, match="use_reentrant"):
        grads(True, **chosen)

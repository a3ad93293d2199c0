"""The weights of `init: scaled` have the spread of the formula, kind by kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

WIDTH, LAYERS, VOCABULARY = 256, 6, 1024
BACKBONES = {
    "llama": {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "gpt_neox": {"hidden_size": WIDTH, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4},
}
RESIDUAL = {
    "llama": ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    "gpt_neox": ("attention.dense.weight", "mlp.dense_4h_to_h.weight"),
    "gpt2": ("attn.c_proj.weight", "mlp.c_proj.weight"),
}
"""The matrices whose output is added to the residual stream."""
CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
"""The standard deviation of a normal distribution that is cut at 3 standard deviations, as a share: 0.987."""


@pytest.fixture(scope="module", params=BACKBONES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> AdaptiveLM:
    torch.manual_seed(0)
    backbone = {"model_type": kind, "vocab_size": VOCABULARY, "tie_word_embeddings": False, **BACKBONES[kind]}
    return AdaptiveLM(AdaptiveConfig(backbone=backbone, init="scaled"))


def spread(weight: Tensor) -> tuple[float, float]:
    """The standard deviation of a weight, and the tolerance: four times its standard error as a share."""
    return weight.std().item(), 4 / math.sqrt(2 * weight.numel())


def test_every_matrix_has_the_spread_of_the_formula(kind, model):
    """std sqrt(2/5D), and for the residual outputs of L layers 1/sqrt(2L) of it."""
    inner, seen = math.sqrt(2 / (5 * WIDTH)), {"inner": 0, "residual": 0}
    for name, weight in model.backbone.lm.named_parameters():
        if weight.ndim < 2:
            continue
        residual = name.endswith(RESIDUAL[kind])
        seen["residual" if residual else "inner"] += 1
        expected = inner / math.sqrt(2 * LAYERS) if residual else inner
        found, tolerance = spread(weight.detach())
        assert found == pytest.approx(CUT * expected, rel=tolerance), name
        assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel()), name
        assert weight.abs().max() <= 3.0001 * expected, name
    assert seen["residual"] == 2 * LAYERS and seen["inner"] >= 2 * LAYERS + 2, "all of them, and embeddings and head"


def test_embeddings_enter_the_layers_at_unit_rms(model):
    """Scaled by sqrt(5D/2), which is 1 / std; the cut of the distribution takes 1.3 % of it."""
    h_BTD = model.backbone.embed(torch.arange(VOCABULARY)[None]).detach()
    rms = h_BTD.square().mean().sqrt().item()
    assert rms == pytest.approx(CUT, rel=4 / math.sqrt(2 * h_BTD.numel())) and rms == pytest.approx(1, abs=0.02)


def test_layers_for_other_inputs_are_drawn_alike(kind, model):
    """The layers of a concept module: their own number counts in the spread of their residual outputs."""
    layers = model.backbone.more_layers(2)
    for name, weight in layers.lm.named_parameters():
        if name.endswith(RESIDUAL[kind]):
            found, tolerance = spread(weight.detach())
            assert found == pytest.approx(CUT * math.sqrt(2 / (5 * WIDTH)) / 2, rel=tolerance), name

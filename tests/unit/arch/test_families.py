"""One entry per model family: what it says is what transformers' own models have."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.arch.dimensions import LayersDiffer, head_dim, kv_heads, layer_kinds
from pondera.arch.families import FAMILIES, describe, family, listed
from pondera.core.hf import DynamicCache


def model(backbone: str) -> Any:
    fields = copy.deepcopy(BACKBONES[backbone])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def test_the_tested_families_are_those_of_the_tests():
    known = {config["model_type"] for config in BACKBONES.values()}
    assert {name for name, each in FAMILIES.items() if each.support != "expected"} == known
    assert {name for name, each in FAMILIES.items() if each.support == "tested"} == known - {"qwen3_next"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_modules_are_where_the_entry_says(backbone: str):
    lm = model(backbone)
    parts = family(lm.config).modules
    if parts is None:
        pytest.skip("whole passes only")
    decoder = lm.get_decoder()
    assert len(getattr(decoder, parts.layers)) == lm.config.num_hidden_layers
    assert isinstance(getattr(decoder, parts.norm), torch.nn.Module)
    assert (parts.rotary is None) == (not hasattr(decoder, "rotary_emb")) == (parts.positions is not None)
    assert parts.rotary is None or isinstance(getattr(decoder, parts.rotary), torch.nn.Module)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_heads_and_kinds_are_those_of_the_rows_in_a_stock_cache(backbone: str):
    lm = model(backbone)
    cache, tokens = DynamicCache(config=lm.config), torch.arange(1, 4)[None]
    with torch.no_grad():
        lm(tokens, past_key_values=cache)
    kinds = layer_kinds(lm.config)
    assert len(kinds) == len(cache.layers)
    for kind, layer in zip(kinds, cache.layers, strict=True):
        assert (kind == "linear_attention") == (not hasattr(layer, "keys"))
        if kind != "linear_attention":
            assert layer.is_sliding == (kind == "sliding_attention")
            assert layer.keys.shape == (1, kv_heads(lm.config), 3, head_dim(lm.config))


class Differing:
    model_type = "mixed"

    @property
    def head_dim(self) -> int:
        raise ValueError("differs by layer")


def test_what_differs_by_layer_is_refused_by_name():
    with pytest.raises(UserError, match="mixed: its configuration has no head_dim that holds for all layers"):
        head_dim(Differing())
    with pytest.raises(UserError, match="no num_key_value_heads"):
        kv_heads(SimpleNamespace(model_type="headless"))


def test_a_thinking_method_that_needs_one_size_is_refused_by_its_own_name(monkeypatch: pytest.MonkeyPatch):
    def differs(config: Any) -> int:
        raise LayersDiffer(config.model_type, "head_dim")

    monkeypatch.setattr("pondera.methods.think.ponder_lm3.head_dim", differs)
    with pytest.raises(
        UserError, match=r"PonderLM3\(thoughts=1\) does not fit llama: its configuration has no head_dim"
    ):
        AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="PonderLM3(thoughts=1)"))


def test_a_family_without_a_known_cost_is_refused_with_those_that_have_one():
    with pytest.raises(
        UserError, match=f"no price is known for model_type 'cohere'; use one of {listed(lambda f: f.layer)}"
    ):
        describe(SimpleNamespace(model_type="cohere"))
    assert family(SimpleNamespace(model_type="unheard_of")).support == "expected"

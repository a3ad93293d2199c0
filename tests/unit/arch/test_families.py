"""One entry per model family: what it says is what transformers' own models have."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, LINEAR
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.arch.dimensions import LayersDiffer, head_dim, kv_heads, layer_kinds
from pondera.arch.families import FAMILIES, Family, Modules, describe, family, listed
from pondera.arch.layers import gated
from pondera.core.hf import DynamicCache
from pondera.cost.measure import measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass
from pondera.methods.kv_cache.dap_q import DapQ
from pondera.methods.kv_cache.lazy_llm import LazyLLM
from pondera.methods.kv_cache.snap_kv import SnapKV
from pondera.models.backbone import Backbone


def model(backbone: str) -> Any:
    fields = copy.deepcopy(BACKBONES[backbone])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def test_the_tested_families_are_those_of_the_tests():
    known = {config["model_type"] for config in BACKBONES.values()}
    assert {name for name, each in FAMILIES.items() if each.support != "expected"} == known
    assert {name for name, each in FAMILIES.items() if each.support == "tested"} == known - {"qwen3_next"}


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - LINEAR))
def test_modules_are_where_the_entry_says(backbone: str):
    lm = model(backbone)
    parts = family(lm.config).modules
    assert parts is not None
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
        UserError, match=f"no cost model for model_type 'cohere'; use one of {listed(lambda f: f.layer)}"
    ):
        describe(SimpleNamespace(model_type="cohere"))
    assert family(SimpleNamespace(model_type="unheard_of")).support == "expected"


@pytest.mark.parametrize(("kind", "interleaved"), [("qwen2", False), ("cohere", True)])
def test_a_further_family_is_one_entry(kind: str, interleaved: bool, monkeypatch: pytest.MonkeyPatch):
    sizes = {name: size for name, size in BACKBONES["llama"].items() if name != "model_type"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **special)).eval()
    backbone, ids_BT = Backbone(lm), torch.arange(3, 12)[None]
    h_BTD, count = backbone.embed(ids_BT), sizes["num_hidden_layers"]
    with pytest.raises(UserError, match=f"{kind}: layer ranges are not supported"):
        backbone.run(h_BTD, range(count))
    with pytest.raises(UserError, match="DapQ moves queries"):
        DapQ(SnapKV(8, window=4)).cache(lm)

    monkeypatch.setitem(FAMILIES, kind, Family(Modules(), gated, interleaved=interleaved))
    with torch.no_grad():
        halves = backbone.run(backbone.run(h_BTD, range(1)), range(1, count))
        torch.testing.assert_close(halves, backbone.step(h_BTD), atol=0, rtol=0)
        spent = measured_flops(lambda: lm(ids_BT))
    own = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb
    rotation = backbone.rotation("full_attention", torch.arange(5, 14)[None], h_BTD)
    assert rotation is not None
    key_BHSd = h_BTD.unflatten(-1, (4, 16)).transpose(1, 2)
    expected = own(key_BHSd, key_BHSd, rotation.cos_BSr, rotation.sin_BSr)[1]
    torch.testing.assert_close(rotation.apply(key_BHSd), expected, atol=1e-6, rtol=1e-5)
    schedule = CostSchedule((DecoderPass(9, 9),), head_rows=9, tokens=9)
    assert spent == pytest.approx(CostModel(lm.config).forward(schedule), rel=1e-6)
    assert DapQ(SnapKV(8, window=4)).cache(lm).kept
    assert LazyLLM().cache(lm).kept

"""CriticalKV: scores times the norm of the projected value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.policy_reference import best, kept, model, run, weights
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pondera import UserError
from pondera.methods.kv_cache.ada_kv import AdaKV
from pondera.methods.kv_cache.compactor import Compactor
from pondera.methods.kv_cache.critical_kv import CriticalKV
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.snap_kv import SnapKV


def test_half_the_budget_goes_by_attention_and_half_by_attention_times_norm():
    x, lm = ids(1, 40), model()
    cache: Any = DynamicCache(config=lm.config)
    lm(x, past_key_values=cache)
    found = kept(run(CriticalKV(SnapKV(12, window=3, kernel=1), epsilon=0.01), x, [40]))
    plain = kept(run(SnapKV(12, window=3, kernel=1), x, [40]))
    for index, (layer, heads) in enumerate(zip(found, weights(x), strict=True)):
        output = lm.get_decoder().layers[index].self_attn.o_proj.weight
        for head, group in enumerate(heads):
            score = [sum(row[query][t] for row in group for query in (37, 38, 39)) for t in range(40)]
            first = set(best(score, 6, {37, 38, 39}))
            norm = []
            for value in cache.layers[index].values[0, head]:
                parts = [output[:, 16 * h : 16 * h + 16] @ value for h in (2 * head, 2 * head + 1)]
                norm.append(sum(float(part.abs().sum()) for part in parts) / 2)
            second = [(s + 0.01) * n for s, n in zip(score, norm, strict=True)]
            assert layer[head] == best(second, 12, first)
    assert found != plain


def test_with_all_in_the_first_stage_it_is_the_policy():
    x = ids(2, 40)
    assert kept(run(CriticalKV(SnapKV(12, window=4), first=1), x, [40])) == kept(run(SnapKV(12, window=4), x, [40]))


def test_within_ada_kv_heads_share_the_budget_and_keep_their_first_stage():
    x = ids(1, 40)
    found = kept(run(AdaKV(CriticalKV(SnapKV(12, window=4))), x, [40]))
    assert all(sum(map(len, layer)) == 24 and min(map(len, layer)) >= 6 for layer in found)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma3"])
def test_the_projection_is_found_under_its_names(family: str):
    config = dict(BACKBONES[family])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    policy = CriticalKV(SnapKV(12, window=4))
    cache: Any = policy.cache(lm)
    with torch.no_grad():
        lm(ids(1, 20), past_key_values=cache)
    layer = cache.kept[0]
    value = layer.tables[0].values[:, :1]
    out: Any = policy.outputs[0]
    heads = out.weight.numel() // lm.config.hidden_size // value.shape[-1]
    wide = torch.zeros(value.shape[2], heads * value.shape[-1])
    R = heads // layer.tables[0].values.shape[1]
    norm = torch.zeros(value.shape[2])
    for head in range(R):
        one = wide.clone()
        one[:, head * value.shape[-1] : (head + 1) * value.shape[-1]] = value[0, 0]
        norm += ((out(one) - out(wide)).abs().sum(-1) / R).detach()
    torch.testing.assert_close(policy.projected(layer, layer.tables[0])[0, 0], norm, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused_in_words():
    policy = CriticalKV(SnapKV(12, window=4))
    policy.cache(model())
    with pytest.raises(UserError, match="already serves another model"):
        policy.cache(model(3))
    with pytest.raises(UserError, match="at the end of the prompt"):
        CriticalKV(H2O(8))
    with pytest.raises(UserError, match="those of Compactor may be negative"):
        CriticalKV(Compactor(20))
    with pytest.raises(UserError, match="from 0 to 1"):
        CriticalKV(first=2)
    with pytest.raises(UserError, match="0 or more"):
        CriticalKV(epsilon=-1)

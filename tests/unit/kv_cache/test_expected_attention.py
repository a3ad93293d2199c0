"""ExpectedAttention: the tokens that queries after the prompt are expected to attend to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.policy_reference import best, kept, model, run
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pondera import UserError
from pondera.core import spec
from pondera.methods.kv_cache.ada_kv import AdaKV
from pondera.methods.kv_cache.common.moments import Moments
from pondera.methods.kv_cache.dap_q import DapQ
from pondera.methods.kv_cache.expected_attention import ExpectedAttention
from pondera.models.rotary import rotary_frequencies


def rotations(lm: Any, width: int, first: int, future: int) -> Tensor:
    """The mean of the rotation matrices of some positions."""
    matrices = []
    for position in range(first, first + future):
        angle = position * rotary_frequencies(lm, "")
        half, matrix = width // 2, torch.zeros(width, width)
        for pair in range(half):
            c, s = angle[pair].cos(), angle[pair].sin()
            matrix[pair, pair], matrix[pair, pair + half] = c, -s
            matrix[pair + half, pair], matrix[pair + half, pair + half] = s, c
        matrices.append(matrix)
    return torch.stack(matrices).mean(0)


def expected(lm: Any, x_1T: Tensor, future: int, epsilon: float, sinks: int) -> list[list[list[float]]]:
    """Reference implementation, by layer, KV head and token: queries from hidden states, one query head at a time."""
    cache: Any = DynamicCache(config=lm.config)
    hidden = lm(x_1T, past_key_values=cache, output_hidden_states=True).hidden_states
    found = []
    for number, layer in enumerate(lm.get_decoder().layers):
        attention = layer.self_attn
        T, width = x_1T.shape[1], attention.head_dim
        query_THD = attention.q_proj(layer.input_layernorm(hidden[number]))[0].view(T, -1, width)
        if hasattr(attention, "q_norm"):
            query_THD = attention.q_norm(query_THD)
        R = rotations(lm, width, T, future)
        heads = []
        for head, (key_TD, value_TD) in enumerate(
            zip(cache.layers[number].keys[0], cache.layers[number].values[0], strict=True)
        ):
            weight = torch.zeros(T - sinks)
            for query_TD in (query_THD[sinks:, 2 * head], query_THD[sinks:, 2 * head + 1]):
                mean, covariance = R @ query_TD.mean(0), R @ query_TD.T.cov(correction=0) @ R.T
                logits = [k @ mean / width**0.5 + k @ covariance @ k / width / 2 for k in key_TD[sinks:]]
                weight += torch.stack(logits).softmax(0) / 2
            score = (weight + epsilon) * value_TD[sinks:].norm(dim=-1)
            heads.append([0.0] * sinks + score.tolist())
        found.append(heads)
    return found


@pytest.mark.parametrize(
    ("family", "future", "epsilon", "sinks"), [("llama", 7, 0.0, 4), ("llama", 1, 0.1, 0), ("qwen3", 20, 0.01, 2)]
)
def test_the_score_is_that_of_queries_from_hidden_states(family: str, future: int, epsilon: float, sinks: int):
    lm, x = model(2, family), ids(1, 40)
    with torch.no_grad():
        score = expected(lm, x, future, epsilon, sinks)
        cache = ExpectedAttention(15, future=future, epsilon=epsilon, sinks=sinks).cache(lm)
        lm(x, past_key_values=cache)
    assert kept(cache) == [[best(head, 15, set(range(sinks))) for head in layer] for layer in score]


def test_statistics_of_parts_are_those_of_the_whole():
    x, there = torch.randn(2, 3, 30, 4) + 5, torch.rand(2, 30) < 0.7
    there[1, :12] = False
    whole = Moments.of(x, there)
    parts = [Moments.of(a, b) for a, b in zip(x.split([5, 7, 18], 2), there.split([5, 7, 18], 1), strict=True)]
    for a, b in zip(whole, parts[0].joined(parts[1]).joined(parts[2]), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.covariance()[0, 1], x[0, 1][there[0]].T.cov(correction=0))


@pytest.mark.parametrize("text", ["ExpectedAttention(0.3, sinks=2)", "AdaKV(ExpectedAttention(9, epsilon=0.02))"])
def test_a_padded_row_keeps_what_it_keeps_alone(text: str):
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 23, 3)]
    x, mask = left_padded(rows)
    cache = spec.build(text, "kv_cache").cache(lm)
    lm(x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, row in enumerate(rows):
        alone = spec.build(text, "kv_cache").cache(lm)
        lm(row[None], past_key_values=alone)
        one = cache.clone()
        one.batch_select_indices(torch.tensor([number]))
        assert [[[t - 40 + len(row) for t in head] for head in layer] for layer in kept(one)] == kept(alone)


def test_nothing_but_slots_is_left_after_the_prompt_and_generated_tokens_stay():
    cache: Any = run(ExpectedAttention(10), ids(2, 46), [40, *[1] * 6])
    assert all(set(layer.state) == {"padding"} for layer in cache.kept)
    assert all(
        len(head) == 16 and head[:4] == [0, 1, 2, 3] and head[-6:] == [*range(40, 46)]
        for layer in kept(cache)
        for head in layer
    )


def test_no_attention_weights_are_computed(monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    for name in ("scores", "attend_natively"):
        monkeypatch.setattr(f"pondera.cache.slot_layer.{name}", never)
    run(ExpectedAttention(10), ids(1, 40), [40])


def test_heads_share_a_budget_by_it_and_bf16():
    assert all(sum(map(len, layer)) == 20 for layer in kept(run(AdaKV(ExpectedAttention(10)), ids(1, 40), [40])))
    lm = copy.deepcopy(model()).to(torch.bfloat16)
    cache = ExpectedAttention(0.5).cache(lm)
    assert lm(ids(2, 30), past_key_values=cache).logits.isfinite().all() and len(kept(cache)[0][0]) == 15


def test_what_does_not_fit_is_refused_in_words():
    config = dict(BACKBONES["gpt2"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="gpt2: ExpectedAttention moves queries by rotary positions"):
        ExpectedAttention().cache(lm)
    with pytest.raises(UserError, match="an observation window at the end"):
        DapQ(ExpectedAttention())
    with pytest.raises(UserError, match="several slots per token"):
        ExpectedAttention().check_passes()
    for text, says in [("ExpectedAttention(future=0)", "1 or more"), ("ExpectedAttention(epsilon=-0.1)", "0 or more")]:
        with pytest.raises(UserError, match=says):
            spec.build(text, "kv_cache")

"""Attention calls reach the layer of the cache, or raise: on architectures whose attention is not Llama's."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cache.slot_attention import PLAIN, Softmax, attend, grouped
from pondera.core.hf import CACHE
from pondera.methods.kv_cache.base import KVCacheMethod
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.kivi import KIVI
from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache
from pondera.methods.kv_cache.streaming_llm import StreamingLLM

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "initializer_range": 0.1,
}  # fmt: skip
LATENT = SMALL | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                  "qk_nope_head_dim": 16, "v_head_dim": 16}  # fmt: skip
DEEPSEEK = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                     "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2, "head_dim": 16}
SERVED = {
    # keys that are expanded or repeated between the cache and attention
    "deepseek_v2": DEEPSEEK | {"head_dim": 8},
    "deepseek_v3": DEEPSEEK,
    "minicpm3": LATENT | {"head_dim": 8},
    "jetmoe": SMALL | {"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    # sinks, and scores that are capped
    "gpt_oss": SMALL | FULL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "granite_swa": SMALL | {"head_dim": 16},
    "gemma2": SMALL | FULL | {"attn_logit_softcapping": 1.0},
    # layers that drop the keywords of a call
    "stablelm": SMALL,
}
OWN = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}
if CACHE == "cache":  # since transformers 5.24 their attention goes through the attention interface
    SERVED |= {"gptj": OWN, "codegen": OWN}
REFUSED = {
    **({} if "gptj" in SERVED else {"gptj": (OWN, "interface"), "codegen": (OWN, "interface")}),
    "bloom": ({"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "interface"),
    "mpt": ({"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4}, "interface"),
    "xglm": ({"vocab_size": 97, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, "interface"),
    "diffllama": (SMALL, "more than once"),
}
SINKS = ("gpt_oss", "granite_swa")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(kind: str = "llama", fields: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    given = fields or SERVED.get(kind) or SMALL
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()
    for module in made.modules():
        if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
            sinks.normal_()
    return made


def read(lm: Any, cache: Any, x: torch.Tensor, pieces: tuple[int, ...] = (12, 1, 1, 3, 1)) -> torch.Tensor:
    return torch.cat([lm(piece, past_key_values=cache).logits for piece in x.split(pieces, 1)], 1)


def stock(lm: Any) -> DynamicCache:
    return DynamicCache(config=lm.config)


@pytest.mark.parametrize("method", [PreallocatedCache(), H2O(64), StreamingLLM(64)])
@pytest.mark.parametrize("kind", SERVED)
def test_what_keeps_everything_is_the_stock_cache(kind: str, method: KVCacheMethod):
    lm, x = model(kind), ids(2, 18)
    expected = read(lm, stock(lm), x)
    torch.testing.assert_close(read(lm, method.cache(lm), x), expected, atol=2e-6, rtol=1e-5)
    if kind not in (
        "deepseek_v2",
        "deepseek_v3",
        "minicpm3",
    ):  # whose keys are products that depend on how many there are
        assert torch.equal(read(lm, method.cache(lm), x), expected)
    assert torch.equal(read(lm, stock(lm), x), expected)


@pytest.mark.parametrize("kind", SERVED)
def test_eviction_is_the_models_own_attention_over_what_is_kept(kind: str):
    """Each decoded token's attention, against the model's own function over the rows of the table."""
    lm, x = model(kind), ids(1, 20)
    cache, seen = H2O(8).cache(lm), []
    for layer in cache.kept:

        def noted(call, *others, layer=layer, own=layer._by_table):
            found, (table,) = own(call, *others), layer.tables
            real = table.real[0, 0]
            rows = (table.keys[:, :, real], table.values[:, :, real])
            expected, _ = call.base(call.module, call.query_BHTD, *rows, None, scaling=call.scaling, **call.further)
            seen.append(int(real.sum()))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            return found

        layer._by_table = noted
    read(lm, cache, x, (14, 1, 1, 1, 1, 1, 1))
    assert seen == [9] * 6 * len(cache.kept)  # the 8 that stay and the new one, in each layer


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", [PreallocatedCache(), H2O(16)])
def test_what_cannot_be_right_is_refused_by_name(kind: str, method: KVCacheMethod):
    fields, why = REFUSED[kind]
    lm, x = model(kind, fields), ids(1, 9)
    expected = lm(x).logits
    with pytest.raises(UserError, match=f"{kind}.*{why}.*DynamicCache"):
        method.cache(lm)
    assert torch.equal(lm(x).logits, expected)
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in lm.modules())


def test_codes_are_refused_where_rows_are_not_what_the_configuration_says():
    with pytest.raises(UserError, match="its attention gets"):
        KIVI().cache(model("deepseek_v3"))


@pytest.mark.parametrize(("kind", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")])
def test_the_configuration_is_left_alone_and_may_change(kind: str, implementation: str):
    lm, x = model(kind), ids(2, 18)
    told = copy.deepcopy(lm.config.to_dict())
    cache = PreallocatedCache().cache(lm)
    lm.set_attn_implementation(implementation)
    assert lm.config._attn_implementation == implementation and lm.config.to_dict() == told
    assert torch.equal(read(lm, cache, x), read(lm, stock(lm), x))


def test_a_cache_is_for_one_model_object():
    one = model()
    others = [
        copy.deepcopy(one),
        pickle.loads(pickle.dumps(one)),
        model(),
    ]  # never seen a cache, or copied before it did
    PreallocatedCache().cache(one)
    others += [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]  # copied afterwards
    for other in others:
        with pytest.raises(UserError, match=r"method.cache\(model\)"):
            read(other, PreallocatedCache().cache(one), ids(1, 18))
        expected = read(other, stock(other), ids(1, 18))
        assert torch.equal(read(other, PreallocatedCache().cache(other), ids(1, 18)), expected)


class Twice(LlamaAttention):
    """Attention that reads the cache of another module, or none, by turns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE) is not None and self.lost:
            cache, kwargs[CACHE] = kwargs[CACHE], None
            rows = torch.zeros(1, 2, 1, 16)
            cache.update(rows, rows, self.layer_idx)
            return torch.zeros_like(kwargs["hidden_states"]), None
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_call_that_is_never_handed_over_raises_in_the_same_forward(layer: int):
    lm = model()
    module = lm.model.layers[layer].self_attn
    module.__class__, module.lost = Twice, False
    cache = PreallocatedCache().cache(lm)
    lm(ids(1, 4), past_key_values=cache)
    module.lost = True
    with pytest.raises(UserError, match="never asked"):
        lm(ids(1, 1), past_key_values=cache)
    module.lost = False
    with pytest.raises(UserError, match="half of a call"):
        lm(ids(1, 1), past_key_values=cache)
    assert torch.equal(lm(ids(1, 4)).logits, lm(ids(1, 4), past_key_values=stock(lm)).logits)  # nothing is left behind


def test_the_check_leaves_no_trace():
    lm = model().train()
    lm.model.norm.eval()
    torch.manual_seed(3)
    modes, state = [module.training for module in lm.modules()], torch.get_rng_state()
    PreallocatedCache().cache(lm)
    assert modes == [module.training for module in lm.modules()] and torch.equal(state, torch.get_rng_state())
    calls = []
    lm.register_forward_hook(lambda *_: calls.append(1))
    H2O(8).cache(lm)
    assert not calls  # the verdict is remembered


def test_threads_do_not_meet():
    """One model, a stock cache in one thread and an evicting one in another, call by call at the same time."""
    lm, x = model(), ids(1, 40)
    pieces = (10, *[1] * 30)
    expected = [read(lm, stock(lm), x, pieces), read(lm, H2O(8).cache(lm), x, pieces)]
    caches, found = [stock(lm), H2O(8).cache(lm)], [None, None]

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = read(lm, caches[number], x, pieces)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_method_in_the_place_of_a_cache_is_refused_in_words():
    with pytest.raises(UserError, match=r"pass H2O\(256\).cache\(model\)"):
        model().generate(ids(1, 4), past_key_values=H2O(256), max_new_tokens=2)


@pytest.mark.parametrize("softmax", [Softmax(softcap=1.5), Softmax(sink_H=torch.tensor([0.5, -1.0, 2.0, 0.0])), PLAIN])
def test_caps_and_sinks_are_what_they_say(softmax: Softmax):
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    allowed = torch.rand(2, 2, 3, 5) < 0.8
    allowed[..., 0] = True
    found = attend(grouped(query, 2), keys, values, allowed, 0.7, softmax)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                scores = keys[b, h // 2] @ query[b, h, t] * 0.7
                if softmax.softcap is not None:
                    scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
                weights = scores.masked_fill(~allowed[b, h // 2, t], -torch.inf).exp()
                sink = softmax.sink_H[h].exp() if softmax.sink_H is not None else 0.0
                expected = weights @ values[b, h // 2] / (weights.sum() + sink)
                torch.testing.assert_close(found[b, t, h], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [StreamingLLM(24), H2O(24)])
def test_slots_are_filled_again_while_drafts_are_recorded(method: KVCacheMethod):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 97,
    }
    lm = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    prompt, held = ids(1, 30), []
    for new in (60, 240):
        cache = method.cache(lm)
        lm.generate(
            prompt, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
        held.append(cache.nbytes())
    alone = method.cache(lm)
    lm.generate(prompt, past_key_values=alone, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert held[0] == held[1] <= 2 * alone.nbytes()


@pytest.mark.parametrize("kind", ["mpt", "bloom", "stablelm"])
@pytest.mark.parametrize("think", ["PonderLM3(thoughts=2)", "AdaPonderLM(steps=2)"])
def test_packed_thinking_is_refused_when_the_model_is_built(kind: str, think: str):
    fields = REFUSED[kind][0] if kind in REFUSED else SERVED[kind]
    with pytest.raises(UserError, match=f"does not fit {kind}"):
        AdaptiveLM(AdaptiveConfig(backbone={"model_type": kind, **fields}, think=think))


def test_whole_passes_fit_decoders_with_attention_of_their_own():
    lm = AdaptiveLM(
        AdaptiveConfig(backbone={"model_type": "bloom", **REFUSED["bloom"][0]}, think="PonderLM2(thoughts=1)")
    )
    assert lm.eval()(ids(1, 5)).logits.isfinite().all()


def test_a_server_that_a_backbone_never_asks_raises():
    backbone = AdaptiveLM(AdaptiveConfig(backbone={"model_type": "bloom", **REFUSED["bloom"][0]})).eval().backbone
    with pytest.raises(UserError, match="bloom: its attention does not go through"):
        backbone.step(torch.randn(1, 3, 64), log_weight_BS=torch.zeros(1, 3))
    known = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]))).eval().backbone
    h = torch.randn(1, 3, known.config.hidden_size)
    torch.testing.assert_close(known.step(h, log_weight_BS=torch.zeros(1, 3)), known.step(h), atol=1e-5, rtol=1e-5)

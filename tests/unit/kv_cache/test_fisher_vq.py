from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, LlamaConfig, LlamaForCausalLM

from pondera.core.errors import UserError
from pondera.methods.kv_cache import fisher_vq
from pondera.methods.kv_cache.common.calibration import collect
from pondera.methods.kv_cache.common.pair_codes import PairCodes, deal_bytes, grouped_units
from pondera.methods.kv_cache.common.sensitivity import key_sensitivity
from pondera.methods.kv_cache.fisher_vq import FisherVQ
from pondera.models.rotary import rotary_frequencies, rotate_by_position

VOCABULARY = 2000
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()


@pytest.fixture(scope="module")
def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (2, 320), generator=generator) for _ in range(14)]


@pytest.fixture(scope="module")
def fitted(model: LlamaForCausalLM, samples: list[Tensor]) -> FisherVQ:
    return FisherVQ(4, window=8, sinks=2, flush_size=4, vectors=2048, texts=2, text_tokens=40).fit(model, samples)


# The parts


def codec(seed: int = 0, heads: int = 2, width: int = 8, codes: int = 16) -> PairCodes:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(heads, codes, width, generator=generator)
    byte = torch.tensor([[0, 1, 1, 2, 0, 1, 1, 2], [3, 3, 4, 4, 3, 3, 4, 4]])
    return PairCodes(table, byte, torch.rand(heads, width, generator=generator) + 0.1)


@given(seed=st.integers(0, 50), batch=st.integers(1, 3), tokens=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_each_group_takes_its_nearest_row_by_weighted_distance(seed: int, batch: int, tokens: int):
    of, x = codec(seed), torch.randn(batch, 2, tokens, 8, generator=torch.Generator().manual_seed(seed + 1))
    parts = of.encode(x)
    assert parts["codes"].shape == (batch, 1, tokens, 5) and parts["codes"].dtype == torch.uint8
    decoded, rows, weight = of.decode(parts), of.rows.view(2, 8, 16), of.scale_c[:-1].square().view(2, 8)
    for b in range(batch):
        for s in range(tokens):
            for number in range(5):
                head = int(number > 2)
                dims = (of.byte_c.view(2, 8)[head] == number).nonzero()[:, 0]
                error = (weight[head, dims, None] * (x[b, head, s, dims, None] - rows[head, dims]).square()).sum(0)
                code = int(parts["codes"][b, 0, s, number])
                assert error[code] <= error.min() + 1e-5
                assert torch.equal(decoded[b, head, s, dims], rows[head, dims, code])


@given(st.integers(0, 100), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_dealt_bytes_are_all_dealt_within_their_bounds(seed: int, layers: int, heads: int):
    variance = torch.exp(4 * torch.randn(layers, heads, 16, generator=torch.Generator().manual_seed(seed)))
    total = 5 * layers * heads
    dealt = deal_bytes(variance, total, 3, 8)
    assert int(dealt.sum()) == total and 3 <= int(dealt.min()) and int(dealt.max()) <= 8


def test_bytes_go_where_the_weighted_variance_is():
    variance = torch.tensor([[[1.0] * 8, [2.0**8] * 8]])
    # 4 bits more for each of 8 coordinates of the second head: 4 bytes more.
    assert deal_bytes(variance, 12, 1, 12).tolist() == [[4, 8]]
    assert deal_bytes(variance, 12, 1, 7).tolist() == [[5, 7]]


@given(st.integers(0, 100), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_every_pair_is_in_one_group(seed: int, groups: int):
    variance = torch.exp(3 * torch.randn(12, generator=torch.Generator().manual_seed(seed)))
    found = grouped_units(variance, torch.full((12,), 2), groups)
    assert len(found) == groups and all(found) and sorted(pair for group in found for pair in group) == list(range(12))
    order = [pair for group in found for pair in group]
    assert torch.equal(variance[order], variance.sort(descending=True).values)


def _kept(out: Tensor, outs: list[Tensor]) -> None:
    out.retain_grad()
    outs.append(out)


def test_sensitivity_is_the_squared_gradient_at_the_output_of_the_key_projection(model: LlamaForCausalLM):
    """Computed in another way: with gradients of all weights, at the projections themselves, before rotary embedding."""
    texts = [torch.arange(1, 13), torch.arange(40, 20, -2)]
    frequency = rotary_frequencies(model, "")
    found = key_sensitivity(model, texts, [0, 1], frequency, False)
    total, count = torch.zeros(2, 2, 16), 0
    for text in texts:
        outs: list[Tensor] = []
        hooks = [
            layer.self_attn.k_proj.register_forward_hook(lambda _, __, out, outs=outs: _kept(out, outs))
            for layer in model.model.layers
        ]
        twice = torch.cat([text, text])[None]
        loss = F.cross_entropy(model(twice).logits[0, len(text) - 1 : -1], text, reduction="sum")
        loss.backward()
        model.zero_grad()
        for hook in hooks:
            hook.remove()
        for layer, out in enumerate(outs):
            assert out.grad is not None
            total[layer] += out.grad[0, : len(text)].view(-1, 2, 16).square().sum(0)
        count += len(text)
    assert torch.allclose(found, total / count, rtol=1e-3, atol=1e-9)
    assert all(parameter.requires_grad for parameter in model.parameters())


# The method


def test_codes_and_tables_have_the_stated_sizes(model: LlamaForCausalLM, fitted: FisherVQ):
    keys, values = fitted.layout(model.config)
    assert fitted.rate(model.config) == 8 * (keys + values) / 32 <= 4
    stored = sum(fitted.get_buffer(name).numel() for name in ("key_tables", "value_tables")) * 2
    assert fitted.table_bytes(model.config) == stored
    cache = fitted.cache(model)
    with torch.no_grad():
        model(torch.randint(VOCABULARY, (1, 200)), past_key_values=cache)
    coded = cache.layers[0].coded[0]
    assert coded >= 180
    assert sum(layer.code_bytes() for layer in cache.layers) == coded * 2 * 2 * (keys + values)


def test_bytes_differ_between_heads_and_add_up(model: LlamaForCausalLM, fitted: FisherVQ):
    counts = (fitted.get_buffer("key_bytes").flatten(1).amax(1) + 1).tolist()
    assert sum(counts) == fitted.layout(model.config)[0] * 2 * 2


def test_decoded_keys_are_near_the_keys(model: LlamaForCausalLM, fitted: FisherVQ):
    ids = torch.randint(VOCABULARY, (2, 120), generator=torch.Generator().manual_seed(5))
    cache, exact = fitted.cache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=exact)
        model(ids, past_key_values=cache)
    for layer, stock in zip(cache.layers, exact.layers, strict=True):
        keys, values, numbers = layer.restored()
        for mine, theirs in ((keys, stock.keys), (values, stock.values)):
            rows = theirs.gather(2, numbers.clamp(min=0)[:, None, :, None].expand_as(mine))
            error = ((mine - rows).square() * (numbers >= 0)[:, None, :, None]).sum() / rows.square().sum()
            assert error < 0.15


def key_error(method: FisherVQ, model: LlamaForCausalLM, weight: Tensor) -> float:
    """The weighted squared error of the keys of a text that was not used to fit."""
    ids = torch.randint(VOCABULARY, (4, 150), generator=torch.Generator().manual_seed(9))
    keys, _, position = collect(model, [ids], [0, 1], 4, 600)
    total = 0.0
    for layer in range(2):
        before = rotate_by_position(keys[layer], -position, method.get_buffer("frequency_P"))[None]
        codec: Any = method.coders(model.config, layer)[0]
        rest = (codec.of.decode(codec.of.encode(before, None), None) - before).square().mean((0, 2))
        total += float((rest * weight[layer]).sum())
    return total


def test_more_bits_lose_less(model: LlamaForCausalLM, samples: list[Tensor]):
    methods = [FisherVQ(bits, vectors=4096, texts=2, text_tokens=40).fit(model, samples) for bits in (1, 2, 4)]
    weight = methods[0].get_buffer("key_weights")
    errors = [key_error(method, model, weight) for method in methods]
    assert errors[0] > errors[1] > errors[2] and errors[0] > 5 * errors[2]


def test_weights_lower_the_weighted_error(
    model: LlamaForCausalLM, samples: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """With the same bytes, keys are nearer where the loss depends on them than with equal weights."""
    settings_ = {"vectors": 4096, "texts": 2, "text_tokens": 40}
    weighted = FisherVQ(2, **settings_).fit(model, samples)
    with monkeypatch.context() as patch:
        patch.setattr(fisher_vq, "key_sensitivity", lambda *_: torch.ones(2, 2, 16))
        equal = FisherVQ(2, **settings_).fit(model, samples)
    weight = weighted.get_buffer("key_weights")
    assert key_error(weighted, model, weight) < 0.9 * key_error(equal, model, weight)


@pytest.mark.parametrize(
    "given_, message",
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "at most 8"),
        ({"vectors": 10}, "vectors=10"),
        ({"texts": 0}, "texts=0"),
        ({"text_tokens": 2}, "text_tokens=2"),
        ({"window": -1}, "window=-1"),
    ],
)
def test_arguments_that_cannot_be(given_: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        FisherVQ(**given_)


def test_what_it_does_not_fit(model: LlamaForCausalLM, fitted: FisherVQ):
    with pytest.raises(UserError, match="would get .* give"):
        FisherVQ(0.2).bind(model.config)
    with pytest.raises(UserError, match="no rotary positions|rotation"):
        FisherVQ().bind(GPT2Config())
    with pytest.raises(UserError, match="too short"):
        FisherVQ(4).fit(model, [torch.arange(20)[None]])
    other = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, **HEADS))
    with pytest.raises(UserError, match="fitted to llama with 2 layers"):
        fitted.cache(other)
    with pytest.raises(UserError, match="has not been fitted"):
        FisherVQ().cache(model)

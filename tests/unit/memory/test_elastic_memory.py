"""ElasticMemory held to its slow form: every layer's past projected anew for every block, and attention written out."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from torch import Tensor

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core import spec
from pondera.methods.memory.common import legendre
from pondera.methods.memory.elastic_memory import ElasticMemory
from pondera.models.method import TokenBatch


def build(memory: str | None, backbone: str = "llama", **fields) -> AdaptiveLM:
    torch.manual_seed(0)
    config = copy.deepcopy(BACKBONES[backbone]) | fields
    model = AdaptiveLM(AdaptiveConfig(backbone=config, memory=memory)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def agree(a: Tensor, b: Tensor, **options) -> None:
    torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-5} | options))


def slow_llama(model: AdaptiveLM, x_BT: Tensor) -> Tensor:
    """Logits by the definition, in the dtype of the model: no cache, no recurrence, no blocks of any call."""
    memory, decoder = model.memory, model.backbone.decoder
    heads, groups = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
    points = torch.tensor(memory.points, dtype=torch.float64)
    h = model.backbone.embed(x_BT)
    place = torch.arange(h.shape[1]) % memory.block

    def turned(z: Tensor, place: Tensor = place) -> Tensor:
        cos, sin = (part[:, None] for part in decoder.rotary_emb(h, place[None]))
        first, second = z.chunk(2, dim=-1)
        return z * cos + torch.cat([-second, first], dim=-1) * sin

    def read(z: Tensor) -> Tensor:
        """Rows at the points of what was so far."""
        seen = z.shape[-2]
        if memory.theta is None:
            c = legendre.entry(0, seen, memory.order).to(z) @ z
            return legendre.basis(points, memory.order).to(z) @ c
        step, entry = (part.to(z) for part in legendre.window(memory.theta, 1, memory.order))
        c = z.new_zeros(*z.shape[:-2], memory.order, z.shape[-1])
        for t in range(seen):
            c = step @ c + entry @ z[..., t : t + 1, :]
        return legendre.basis(1 - (1 - points) * min(1, seen / memory.theta), memory.order).to(z) @ c

    def split(z: Tensor, count: int) -> Tensor:
        return z.unflatten(-1, (count, -1)).transpose(1, 2)

    for layer in decoder.layers:
        attention, z = layer.self_attn, layer.input_layernorm(h)
        query = turned(split(attention.q_proj(z), heads))
        raw, value = split(attention.k_proj(z), groups), split(attention.v_proj(z), groups)
        key, out = turned(raw), []
        for first in range(0, h.shape[1], memory.block):
            stop = min(first + memory.block, h.shape[1])
            k, v = key[:, :, first:stop], value[:, :, first:stop]
            mems = min(first, memory.local_context)
            if mems:
                before = slice(first - mems, first)
                k = torch.cat([turned(raw[:, :, before], torch.arange(-mems, 0)), k], dim=-2)
                v = torch.cat([value[:, :, before], v], dim=-2)
            if first and len(points):
                k, v = (
                    torch.cat([read(raw[:, :, :first]), k], dim=-2),
                    torch.cat([read(value[:, :, :first]), v], dim=-2),
                )
            # A trapezoid: all of memory, and the block's own rows up to each.
            seen = torch.ones(stop - first, k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - (stop - first))
            k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
            score = query[:, :, first:stop] @ k.transpose(-1, -2) * attention.scaling
            out.append(score.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
        h = h + attention.o_proj(torch.cat(out, dim=-2).transpose(1, 2).flatten(-2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.backbone.head(decoder.norm(h))


@pytest.mark.parametrize(
    "memory",
    [
        "ElasticMemory(block=4, order=6, samples=3)",
        "ElasticMemory(block=5, order=9, points=[0.0, 0.3, 1.0, 0.7])",
        "ElasticMemory(block=3, order=2, samples=5, points='recent', tbptt=None)",
        "ElasticMemory(block=4, order=6, points=[0.1, 0.8], measure='legt', theta=11.5)",
        "ElasticMemory(block=4, order=6, samples=3, local_context=6)",
        "ElasticMemory(block=4, samples=0)",
    ],
)
def test_it_is_the_slow_form(memory: str):
    model, x = build(memory).double(), ids(2, 23)
    with torch.no_grad():
        agree(model(x).logits, slow_llama(model, x), atol=1e-9, rtol=1e-9)
        agree(model.float()(x).logits, slow_llama(model, x))


def test_gradients_are_those_of_the_slow_form():
    model, x = build("ElasticMemory(block=4, order=6, samples=3, tbptt=None)").double().train(), ids(2, 14)

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    fast, slow = gradients(model(x).logits), gradients(slow_llama(model, x))
    assert fast.keys() == slow.keys()
    for name, gradient in slow.items():
        agree(fast[name], gradient, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize(("tbptt", "reached"), [(1, [1, 1, 1, 1, 1]), (2, [1, 2, 1, 2, 1]), (None, [1, 2, 3, 4, 5])])
def test_gradients_reach_back_so_many_blocks_and_no_further(tbptt: int | None, reached: list[int]):
    model = build(f"ElasticMemory(block=4, order=6, samples=3, tbptt={tbptt})").train()
    h = model.backbone.embed(ids(1, 20)).detach().requires_grad_()
    out = model.memory(model.backbone, TokenBatch(h, torch.arange(20)[None])).h_BTD
    for block, count in enumerate(reached):
        (gradient,) = torch.autograd.grad(out[:, 4 * block : 4 * block + 4, 0].sum(), h, retain_graph=True)
        touched = gradient[0].unflatten(0, (5, 4)).abs().amax((1, 2)) > 0
        assert touched.tolist() == [block - count < other <= block for other in range(5)]


@torch.no_grad()
def test_without_samples_blocks_are_texts_of_their_own():
    model, plain, x = build("ElasticMemory(block=4, samples=0)"), build(None), ids(2, 14)
    alone = torch.cat([plain(block).logits for block in x.split(4, dim=1)], dim=1)
    agree(model(x).logits, alone)
    agree(build("TransformerXL(block=4, mems=0)")(x).logits, alone)


@torch.no_grad()
def test_memory_of_nothing_is_not_no_memory(monkeypatch: pytest.MonkeyPatch):
    """Rows of zeros take softmax mass, which is why there are none beside the first block."""
    without, x = build("ElasticMemory(block=4, samples=0)")(ids(1, 12)).logits, ids(1, 12)
    model = build("ElasticMemory(block=4, order=6, samples=3)")
    agree(model(x).logits[:, :4], without[:, :4])
    update_memory = model.memory.update_memory
    monkeypatch.setattr(
        model.memory, "update_memory", lambda *given: {k: torch.zeros_like(v) for k, v in update_memory(*given).items()}
    )
    assert (model(x).logits - without)[:, 4:].abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_where_is_sampled_can_be_changed_later():
    model, x = build("ElasticMemory(block=4, order=6, samples=3)"), ids(1, 12)
    model.memory.look("recent", 5)
    agree(model(x).logits, build("ElasticMemory(block=4, order=6, samples=5, points='recent')")(x).logits)
    model.memory.look([0.25, 0.5])
    agree(model(x).logits, build("ElasticMemory(block=4, order=6, points=[0.25, 0.5])")(x).logits)
    assert model.memory.samples == 2


def test_a_window_that_is_not_full_is_sampled_where_it_is():
    """A constant is read as such from the first block on, though the window began with nothing."""
    memory = ElasticMemory(block=8, order=24, samples=4, measure="legt", theta=32.0)
    ones = torch.ones(1, 1, 8, 1)
    held, found = {}, []
    for blocks in range(6):
        held = memory.update_memory(held, ones, ones, [blocks])
        found.append(held["rows_v"].flatten())
    assert (torch.stack(found) - 1).abs().max() < 0.1


def test_texts_of_one_batch_have_matrices_of_their_own():
    memory, draw = ElasticMemory(block=4, order=5, samples=3), torch.Generator().manual_seed(0)
    key, value, c = (torch.randn(2, 2, n, 3, generator=draw) for n in (4, 4, 5))
    held = {"coefficients_k": c, "coefficients_v": c}
    together = memory.update_memory(held, key, value, [3, 0])
    for text, blocks in enumerate((3, 0)):
        own = slice(text, text + 1)
        before = {name: x[own] for name, x in held.items()} if blocks else {}
        for name, x in memory.update_memory(before, key[own], value[own], [blocks]).items():
            agree(together[name][own], x)


@torch.no_grad()
def test_coefficients_are_float32_under_bfloat16():
    model, x = build("ElasticMemory(block=4, order=6, samples=3)"), ids(2, 12)
    fine, coarse, cache = model(x).logits, model.to(torch.bfloat16), model.new_cache()
    found = coarse(x, past_key_values=cache).logits.float()
    assert (fine - found).abs().max() < 0.1 * fine.abs().max()
    held = cache.layers[0].held
    assert held["coefficients_k"].dtype == torch.float32 and held["rows_k"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ElasticMemory(block=0)", "block=0: give 1 or more"),
        ("ElasticMemory(order=0)", "order=0: give 1 or more"),
        ("ElasticMemory(samples=-1)", "samples=-1: give 0 or more"),
        ("ElasticMemory(tbptt=0)", "tbptt=0: give 1 or more"),
        ("ElasticMemory(measure='leg')", "legs"),
        ("ElasticMemory(points='even')", "uniform"),
        ("ElasticMemory(points=[0.5, 2.0])", "from 0 .* to 1"),
        ("ElasticMemory(measure='legt')", "needs theta > 0"),
        ("ElasticMemory(theta=8.0)", "'legs' takes no theta"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, said: str):
    with pytest.raises(UserError, match=said):
        spec.build(text, "memory")


@pytest.mark.parametrize(
    ("backbone", "memory", "said"),
    [
        ("qwen3_next", "ElasticMemory()", "ElasticMemory does not fit qwen3_next: its linear-attention"),
        ("mistral", "ElasticMemory()", "does not fit this mistral: all its layers have sliding windows of 6"),
        ("gemma3", "ElasticMemory(layers=[0])", r"layers=\[0\].*without one are \[5\]"),
        ("gpt2", "ElasticMemory(block=256)", "learned positions for 128 tokens; give 128"),
    ],
)
def test_backbones_that_do_not_fit_are_refused_by_name(backbone: str, memory: str, said: str):
    with pytest.raises(UserError, match=said):
        build(memory, backbone)


@pytest.mark.parametrize("other", [{"think": "PonderLM2(thoughts=1)"}, {"chunk": "ConceptLM()"}])
def test_two_methods_at_once_are_refused_by_name(other: dict[str, str]):
    with pytest.raises(UserError, match=r"memory: ElasticMemory\(\) cannot be combined: .*leave one of them out"):
        AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), memory="ElasticMemory()", **other)


@torch.no_grad()
def test_one_block_is_the_backbone():
    x = ids(2, 12)
    for backbone in ("llama", "gpt_neox", "gpt2"):
        agree(build("ElasticMemory(block=12)", backbone)(x).logits, build(None, backbone)(x).logits)
    assert VOCAB == build(None)(x).logits.shape[-1]


@torch.no_grad()
def test_a_text_may_be_longer_than_there_are_positions():
    model, x = build("ElasticMemory(block=32, order=6, samples=3)", "gpt2"), ids(1, 150)
    cache = model.new_cache()
    pieces = torch.cat([model(piece, past_key_values=cache).logits for piece in x.split(50, dim=1)], dim=1)
    agree(pieces, model(x).logits)
    assert model.positions is None and build(None, "gpt2").positions == 128

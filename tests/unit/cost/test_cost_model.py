"""Analytic prices agree with what torch counts and with what a live cache holds."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pondera.core.errors import UserError
from pondera.cost.measure import live_cache_bytes, measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule, DecoderPass

WINDOW = 16
SMALL = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
# With dropout on the scores, the CPU has no fused attention.
GPT2 = dict(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=128, attn_pdrop=0.0)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=12, num_experts=0,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48)

CONFIGS = {
    "llama": ("llama", SMALL),
    "llama-gqa": ("llama", SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mqa-biases": (
        "llama",
        SMALL | dict(num_key_value_heads=1, head_dim=24, attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("mistral", SMALL | dict(num_key_value_heads=2, sliding_window=WINDOW)),
    "mistral-no-window": ("mistral", SMALL | dict(num_key_value_heads=4, head_dim=8, sliding_window=None)),
    "qwen3": ("qwen3", SMALL | dict(num_key_value_heads=2, head_dim=24)),
    "qwen3-sliding": (
        "qwen3",
        SMALL | dict(num_key_value_heads=1, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "gemma3": (
        "gemma3_text",
        SMALL | dict(num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, sliding_window_pattern=3),
    ),
    "gemma3-untied": (
        "gemma3_text",
        SMALL | dict(num_key_value_heads=2, head_dim=32, sliding_window=WINDOW, tie_word_embeddings=False),
    ),
    "gpt_neox": ("gpt_neox", SMALL),
    "gpt_neox-no-bias": ("gpt_neox", SMALL | dict(num_attention_heads=2, attention_bias=False)),
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner": ("gpt2", GPT2 | dict(n_head=2, n_inner=96, tie_word_embeddings=False)),
    "qwen3_next": ("qwen3_next", SMALL | LINEAR | dict(num_key_value_heads=2, head_dim=24)),
    "qwen3_next-wide-values": (
        "qwen3_next",
        SMALL | LINEAR | dict(num_key_value_heads=1, head_dim=16, linear_value_head_dim=24, linear_conv_kernel_dim=3),
    ),
    "qwen3_next-experts": (
        "qwen3_next",
        SMALL | LINEAR | EXPERTS | dict(num_key_value_heads=2, head_dim=16, mlp_only_layers=[1]),
    ),
}


def build(name: str, attention: str = "eager"):
    model_type, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def ids(rows: int) -> torch.Tensor:
    return torch.arange(rows)[None] % 97


def whole(rows: int) -> CostSchedule:
    return CostSchedule(calls=(DecoderPass(queries=rows, keys=rows),), head_rows=rows, tokens=rows)


def filled(model, prompt: int, steps: int = 1) -> DynamicCache:
    """A cache that has seen a prompt in one piece and then some single tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for rows in (prompt, *[1] * steps):
            model(ids(rows), past_key_values=cache)
    return cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_forward(name, attention):
    model = build(name, attention)
    prices = CostModel(model.config)
    for rows in (9, 70):  # inside the window and one chunk of linear attention; beyond both

        def loss(rows=rows):
            return model(ids(rows), labels=ids(rows), use_cache=False).loss

        assert prices.forward(whole(rows)) == measured_flops(loss)
        assert prices.training(whole(rows)) == measured_flops(lambda: loss().backward())  # noqa: B023


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prefill_and_cached_decoding(name, attention):
    model = build(name, attention)
    prices = CostModel(model.config)
    empty = DynamicCache(config=model.config)
    prefill = measured_flops(lambda: model(ids(40), past_key_values=empty, logits_to_keep=1))
    assert prices.forward(CostSchedule((DecoderPass(40, 40),), head_rows=1, tokens=40)) == prefill
    for past in (5, WINDOW, 40):
        for rows in (1, 6):
            cache = filled(model, past - 1)
            step = measured_flops(lambda: model(ids(rows), past_key_values=cache))  # noqa: B023
            call = DecoderPass(queries=rows, keys=past + rows, cached=True)
            assert prices.step(call) + prices.head(rows) == step


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_counter(name):
    """Without our corrections the counter agrees too, but for the one known mistake in depthwise convolutions."""
    model = build(name)
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(ids(70), labels=ids(70), use_cache=False).loss.backward()
    phantom = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            rows = 70 + module.kernel_size[0] - 1
            phantom += 2 * rows * module.kernel_size[0] * module.groups * (module.groups - 1)
    assert counter.get_total_flops() - phantom == CostModel(model.config).training(whole(70))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    model = build(name)
    counts = CostModel(model.config).parameters()
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == sum(table.weight.numel() for table in tables)
    assert counts["head"] == (0 if tied else model.get_output_embeddings().weight.numel())
    assert counts["body"] == counts["total"] - counts["embedding"] - counts["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cache_bytes(name, dtype):
    model = build(name).to(dtype)
    prices = CostModel(model.config)
    for slots in (2, WINDOW - 1, WINDOW, WINDOW + 1, 40):
        assert live_cache_bytes(filled(model, slots - 1)) == prices.cache_bytes(slots, dtype.itemsize)
    assert live_cache_bytes(DynamicCache(config=model.config)) == prices.cache_bytes(0)


def test_a_long_prompt_stays_until_the_next_step():
    model = build("mistral")
    prices = CostModel(model.config)
    assert live_cache_bytes(filled(model, 40, steps=0)) > prices.cache_bytes(40)
    assert live_cache_bytes(filled(model, 40, steps=1)) == prices.cache_bytes(41) == prices.cache_bytes(WINDOW)


def test_a_storage_counts_once():
    rows = torch.zeros(10, 4)
    layer = SimpleNamespace(keys=rows[:3], values=rows[5:], states={0: [torch.zeros(2)], 1: (None, rows)}, name="layer")
    assert live_cache_bytes(SimpleNamespace(layers=[layer, layer])) == (40 + 2) * 4  # type: ignore[arg-type]


def test_a_schedule_adds_up():
    model = build("llama-gqa")
    prices = CostModel(model.config)
    one, two = DecoderPass(7, 7), DecoderPass(3, 10, cached=True)
    assert prices.forward(CostSchedule((one, two), head_rows=4, tokens=5)) == (
        prices.step(one) + prices.step(two) + prices.head(4)
    )

    def twice():
        h_BTD = model.model(ids(12), use_cache=False).last_hidden_state
        h_BTD = model.model(inputs_embeds=h_BTD, use_cache=False).last_hidden_state
        model.lm_head(h_BTD[:, -5:]).sum().backward()

    assert prices.training(
        CostSchedule((DecoderPass(12, 12), DecoderPass(12, 12)), head_rows=5, tokens=12)
    ) == measured_flops(twice)


def test_unknown_architecture():
    with pytest.raises(UserError, match=r"'mamba'.*gemma3_text, gpt2, gpt_neox, llama, mistral, qwen3, qwen3_next"):
        CostModel(AutoConfig.for_model("mamba"))


def test_nothing_heavy_is_imported():
    code = "import sys, pondera.cost.model; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

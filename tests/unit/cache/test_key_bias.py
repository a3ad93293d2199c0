"""Log-weights as one more coordinate: equal to adding them to the scores, gradients too, and fused kernels take them."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES
from helpers.fresh_process import copies
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.cache.key_bias import LogWeight, extra_coordinates
from pondera.cache.masks import SlotMask
from pondera.core.hf import sdpa_attention
from pondera.models.backbone import Backbone

FAMILIES = ["llama", "mistral", "qwen3", "qwen3_mixed", "gemma3", "gpt_neox", "gpt2"]


@copies
def backbone(name: str, attention: str = "sdpa") -> Backbone:
    torch.manual_seed(0)
    made = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[name]))).eval().backbone
    made.lm.set_attn_implementation(attention)
    return made


def slots(made: Backbone, batch: int = 2, count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and log-weights that want gradients, and positions of which each stands twice."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(batch, count, made.config.hidden_size, generator=generator).requires_grad_()
    weight = (-5 * torch.rand(batch, count, generator=generator)).requires_grad_()
    return h, weight, torch.arange(count // 2)[None].repeat_interleave(2, dim=1)


def causal(positions: torch.Tensor, weight: torch.Tensor | None) -> SlotMask:
    order = torch.arange(positions.shape[1])
    return SlotMask((order[:, None] >= order)[None], positions, positions, weight)


def compare(found: dict[str, torch.Tensor], h: torch.Tensor, weight: torch.Tensor) -> None:
    """All forms give the same states and the same gradients."""
    gradients = {
        form: torch.autograd.grad((out * out.detach().roll(1)).sum(), [h, weight]) for form, out in found.items()
    }
    first, *others = found
    assert gradients[first][1].abs().max() > 1e-3
    for other in others:
        torch.testing.assert_close(found[other], found[first], atol=1e-5, rtol=1e-5)
        for one, two in zip(gradients[other], gradients[first], strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_what_adding_to_the_scores_is(name: str, attention: str):
    """With grouped heads, rotation, sliding windows, learned positions."""
    made = backbone(name, attention)
    h, weight, positions = slots(made)
    found = {
        "added": made.step(h, None, causal(positions, weight), positions),
        "coordinate": made.step(h, None, causal(positions, None), positions, log_weight_BS=weight),
    }
    if attention == "sdpa" and "sliding_attention" not in made.layer_types:
        found["without a mask"] = made.step(h, None, None, positions, log_weight_BS=weight)
    compare(found, h, weight)
    assert (made.step(h, None, causal(positions, None), positions) - found["added"]).abs().max() > 1e-3
    assert made.config._attn_implementation == attention  # put back


def test_padding_and_documents_are_masked_as_ever():
    made = backbone("llama")
    h, weight, positions = slots(made)
    for mask in (torch.tensor([[0] * 4 + [1] * 8, [1] * 12]), torch.tensor([[1] * 4 + [2] * 8, [1] * 12])):
        order = torch.arange(12)
        allowed = (order[:, None] >= order) & (mask[:, :, None] == mask[:, None, :])
        added = made.step(h, None, SlotMask(allowed, positions, positions, weight), positions)
        coordinate = made.step(h, None, mask, positions, log_weight_BS=weight)
        torch.testing.assert_close(coordinate[mask > 0], added[mask > 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [16, 20, 24])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_any_head_width_and_scale(width: int, scaling: float | None):
    torch.manual_seed(0)
    module = backbone("llama").decoder.layers[0].self_attn  # 4 heads, 2 for keys and values
    query, key, value = torch.randn(1, 4, 7, width), torch.randn(1, 2, 7, width), torch.randn(1, 2, 7, width)
    weight = -3 * torch.rand(1, 7)
    out, _ = LogWeight(weight)(sdpa_attention, module, query, key, value, None, scaling)
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    scores = query @ key.mT * (scaling or width**-0.5) + weight[:, None, None]
    slow = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(out, slow.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert (width + extra_coordinates(width)) % 8 == 0


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_fused_kernels_take_it_and_refuse_what_is_added():
    made = backbone("llama")
    h, weight, positions = slots(made)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        made.step(h, None, None, positions, log_weight_BS=weight).sum().backward()
        with pytest.raises(RuntimeError, match="kernel"):
            made.step(h, None, causal(positions, weight), positions)
        narrow = torch.randn(1, 4, 7, 16)
        with pytest.raises(RuntimeError, match="kernel"):  # which is why values are widened, too
            F.scaled_dot_product_attention(F.pad(narrow, (0, 8)), F.pad(narrow, (0, 8)), narrow, is_causal=True)


def test_bf16_keeps_the_smallest_weights_apart():
    made = backbone("llama")
    h, _, positions = slots(made)
    weight = torch.tensor([[0.0, -9.2] * 6, [-9.2, 0.0] * 6])
    fine = made.step(h, None, None, positions, log_weight_BS=weight)
    coarse = made.to(torch.bfloat16).step(h.bfloat16(), None, None, positions, log_weight_BS=weight)
    assert (fine - coarse.float()).abs().max() < 0.05 * fine.abs().max()

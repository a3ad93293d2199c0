"""The highest logits alone equal the highest of all logits, in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.models.top_logits import TopLogits, top_logits


@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(frozen: bool):
    torch.manual_seed(0)
    h, weight, upstream = torch.randn(2, 5, 16), torch.randn(31, 16), torch.randn(2, 5, 4)
    found = []
    for form in (lambda h, weight: (h @ weight.mT).topk(4, dim=-1), lambda h, weight: top_logits(h, weight, 4)):
        inputs = h.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        logits, chosen = form(*inputs)
        logits.backward(upstream)
        found.append((logits.detach(), chosen, inputs[0].grad, inputs[1].grad))
    for slow, fast in zip(*found, strict=True):
        if slow is None:
            assert fast is None
        else:
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_gradcheck():
    torch.manual_seed(0)
    h, weight = torch.randn(1, 3, 4, dtype=torch.double), torch.randn(7, 4, dtype=torch.double)
    inputs = (h.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, weight: TopLogits.apply(h, weight, 2)[0], inputs)


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_head(backbone: str, bias: bool):
    settings = copy.deepcopy(BACKBONES[backbone]) | ({"final_logit_softcapping": 3.0} if backbone == "gemma3" else {})
    model = AdaptiveLM(AdaptiveConfig(backbone=settings)).backbone
    if bias:
        model.lm.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(97))
    h = model.step(model.embed(ids(2, 5)))
    wanted, found = model.head(h).topk(6, dim=-1), model.top(h, 6)
    torch.testing.assert_close(found[0], wanted.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], wanted.indices)

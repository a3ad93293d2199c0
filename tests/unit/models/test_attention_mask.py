"""Attention masks of a wrong form are refused, with and without a cache; longer ones change nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM, UserError

KINDS = {
    "plain": {},
    "think": {"think": "PonderLM2(thoughts=1, eval_rounds='exact')"},
    "halting": {"think": "UniversalTransformer(steps=2, halting='random')"},
    "chunk": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4)"},
    "kv_cache": {"kv_cache": "H2O(200)"},
}


def build(kind: str) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), **KINDS[kind])).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_must_cover_the_cached_tokens(kind: str):
    model, x = build(kind), ids(2, 10)
    with torch.no_grad():
        whole = model(x).logits[:, 7:]
        for width in (10, 30):
            cache = model.new_cache()
            model(x[:, :7], past_key_values=cache)
            mask = torch.ones(2, width, dtype=torch.long)
            torch.testing.assert_close(
                model(x[:, 7:], attention_mask=mask, past_key_values=cache).logits, whole, atol=1e-5, rtol=1e-5
            )
        with pytest.raises(UserError, match=r"expected \[2, 10\] \(7 cached and 3 new tokens\)"):
            cache = model.new_cache()
            model(x[:, :7], past_key_values=cache)
            model(x[:, 7:], attention_mask=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("kind", ["think", "chunk"])
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 1, dtype=torch.long), r"shape \[2, 1\]"),
        (torch.ones(3, 10, dtype=torch.long), r"shape \[3, 10\]"),
        (torch.ones(2, 1, 10, 10), "4 dimensions"),
        (-torch.ones(2, 10, dtype=torch.long), "negative"),
        ({"full_attention": None}, "dict"),
    ],
)
def test_other_forms_are_refused_by_name(kind: str, mask: object, said: str):
    with torch.no_grad(), pytest.raises(UserError, match=said):
        build(kind)(ids(2, 10), attention_mask=mask)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_call_without_tokens_is_refused(shape: tuple[int, int]):
    with pytest.raises(UserError, match="at least one token"):
        build("think")(torch.zeros(shape, dtype=torch.long))

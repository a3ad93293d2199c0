"""The contract tests of the seam `head`, for every method in the index.

Batch rows are independent, the loss is the cross-entropy of the logits, a loaded model equals the saved one, and the repr is
the spec string.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.declared import form, forms
from torch.nn import functional as F

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.core import spec
from pondera.methods.head.base import IGNORED, Head

FORMS = forms("head")
V, D = 50, 12


def made(case: str) -> Head:
    torch.manual_seed(0)
    head = spec.build(form(FORMS, case, "exact"), "head")
    head.bind(V, D, None)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", FORMS)
def test_it_declares_how_it_is_tested(case: str):
    assert "exact" in FORMS[case], f'{case}: add the class attribute examples = {{"exact": "{case}(...)"}}'
    assert repr(spec.build(FORMS[case]["exact"], "head")) == spec.format(spec.parse(repr(made(case))))


@pytest.mark.parametrize("case", FORMS)
def test_a_state_gets_the_same_logits_in_any_company(case: str):
    head, h_BTD = made(case), states(3, 5)
    logits_BTV = head(h_BTD)
    assert logits_BTV.shape == (3, 5, V)
    for row in range(3):
        torch.testing.assert_close(head(h_BTD[row : row + 1, 2:3])[0, 0], logits_BTV[row, 2])


@pytest.mark.parametrize("case", FORMS)
def test_the_loss_is_the_cross_entropy_of_the_logits(case: str):
    head, labels_BT = made(case), torch.arange(10).view(2, 5) % V
    labels_BT[0, :2] = IGNORED
    found, expected = (states(2, 5).requires_grad_() for _ in range(2))
    term = head.term(found, labels_BT)
    wanted = F.cross_entropy(head(expected).flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(term.sum, wanted)
    assert float(term.count) == 8
    term.sum.backward()
    wanted.backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("case", FORMS)
def test_a_model_with_it_is_saved_and_generates(case: str, tmp_path):
    torch.manual_seed(0)
    backbone = copy.deepcopy(BACKBONES["llama"]) | {"tie_word_embeddings": False}
    model = AdaptiveLM(AdaptiveConfig(backbone=backbone, head=form(FORMS, case, "exact"))).eval()
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(AdaptiveLM.from_pretrained(tmp_path).eval())
    assert torch.equal(again(ids(2, 7)).logits, model(ids(2, 7)).logits) and again.config.head == model.config.head
    slow = ids(1, 4)
    for _ in range(3):
        slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(1, 4), **options), slow)

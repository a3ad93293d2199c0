"""The caller can choose the passes of each token, on every think method whose tokens halt individually."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ids, left_padded
from helpers.declared import forms

from pondera import AdaptiveLM, UserError

from .test_think import FORMS, build

CASES = [
    (method, name)
    for method in forms("think")
    for name in FORMS[method]
    if name.startswith("exact") and build(FORMS[method][name]).think.accepts_passes
]
REFUSING = [FORMS[method]["exact"] for method in FORMS if method not in dict(CASES)]


def model_of(method: str, name: str) -> AdaptiveLM:
    return build(FORMS[method][name])


def random_passes(model: AdaptiveLM, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, model.method.slots_per_token + 1, (rows, tokens), generator=generator)


def test_the_methods_that_halt_accept_passes():
    methods = {method for method, _ in CASES}
    assert {"AdaptiveLatentCoT", "PonderLM3", "AdaPonderLM", "UniversalTransformer", "ThinkAtHard"} <= methods


@pytest.mark.parametrize(("method", "name"), CASES)
@torch.no_grad()
def test_each_token_takes_the_chosen_passes_and_thinks_with_them(method: str, name: str):
    model, x = model_of(method, name), ids(2, 11)
    passes = random_passes(model, 2, 11)
    out = model(x, passes=passes)
    assert torch.equal(out.passes, passes)
    fewer = model(x, passes=torch.ones_like(passes))
    assert torch.equal(fewer.passes, torch.ones_like(passes))
    assert not torch.allclose(out.logits, fewer.logits, atol=1e-3)
    assert torch.equal(model(x, passes=passes + 50).passes, torch.full_like(passes, model.method.slots_per_token))


@pytest.mark.parametrize(("method", "name"), CASES)
@torch.no_grad()
def test_its_own_choice_given_back_changes_nothing(method: str, name: str):
    model, x = model_of(method, name), ids(2, 11)
    own = model(x)
    again = model(x, passes=own.passes)
    torch.testing.assert_close(again.logits, own.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "name"), CASES)
@torch.no_grad()
def test_cached_and_padded_equal_the_whole(method: str, name: str):
    model, rows = model_of(method, name), [ids(1, n, seed=n)[0] for n in (9, 5)]
    x, mask = left_padded(rows)
    passes = random_passes(model, *x.shape)
    cache = model.new_cache()
    model(x[:, :7], attention_mask=mask[:, :7], past_key_values=cache, passes=passes[:, :7])
    last = model(x[:, 7:], attention_mask=mask, past_key_values=cache, passes=passes[:, 7:]).logits
    for row, own, logits in zip(rows, passes, last, strict=True):
        alone = model(row[None], passes=own[None, -len(row) :]).logits[0, -2:]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_training_follows_the_choice(method: str, name: str):
    model, x = model_of(method, name).train(), ids(2, 8)
    passes = random_passes(model, 2, 8)
    out = model(x, labels=x, passes=passes)
    out.loss.backward()
    assert torch.equal(out.passes, passes)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("think", REFUSING)
def test_methods_with_equal_passes_refuse(think: str):
    with pytest.raises(UserError, match="the same number of passes for every token"):
        build(think)(ids(1, 4), passes=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (torch.ones(1, 3, dtype=torch.long), r"shape \[1, 4\]"),
        (torch.ones(1, 4), "integers"),
        (torch.zeros(1, 4, dtype=torch.long), "at least 1"),
    ],
)
def test_impossible_passes_are_refused(passes: torch.Tensor, message: str):
    with pytest.raises(UserError, match=message):
        build("AdaptiveLatentCoT(steps=2, halting='fixed')")(ids(1, 4), passes=passes)


def test_a_plain_model_refuses():
    with pytest.raises(UserError, match="a model without a method"):
        build(None)(ids(1, 4), passes=torch.ones(1, 4, dtype=torch.long))

"""PonderLM's own invariants, held against the paper's equations written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import checkpoint_activations, is_checkpointing
from pondera.models.backbone import Backbone
from pondera.models.method import TokenBatch

FAMILIES = ["llama", "gemma3", "gpt_neox", "gpt2"]  # the first two with grouped keys and values


@copies
def build(think: str, backbone: str = "llama", **config) -> AdaptiveLM:
    torch.manual_seed(0)
    config = {"init": "scaled"} | config
    return AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), think=think, **config)).eval()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def inputs_of_each_pass(model: AdaptiveLM, x: torch.Tensor) -> list[torch.Tensor]:
    """E_0, E_1, ... of one forward."""
    seen: list[torch.Tensor] = []
    original = model.backbone.step

    def spy(h, *others):
        seen.append(h)
        return original(h, *others)

    model.backbone.step = spy
    model(x)
    del model.backbone.step
    return seen


def by_the_paper(model: AdaptiveLM, x: torch.Tensor, steps: int, top: int | None = None, accumulate: bool = True):
    """The paper's equations with plain transformers calls: E_{i+1} = E_i + softmax(W_out H_i) W_in."""
    lm = model.backbone.lm
    table = lm.get_input_embeddings()(torch.arange(VOCAB))
    first = current = table[x]
    for _ in range(steps):
        states = lm.get_decoder()(inputs_embeds=current, use_cache=False).last_hidden_state
        logits = lm.get_output_embeddings()(states)
        if top is not None:
            logits = logits.masked_fill(logits < logits.topk(top).values[..., -1:], -math.inf)
        current = (current if accumulate else first) + logits.softmax(-1) @ table
    return lm(inputs_embeds=current, use_cache=False).logits


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize(("steps", "top"), [(1, None), (3, None), (3, 10)])
def test_it_is_the_papers_equations(backbone: str, steps: int, top: int | None):
    model, x = build(f"PonderLM(steps={steps}, top_k={top})", backbone), ids(2, 9)
    agree(model.backbone.embed(x), model.get_input_embeddings().weight[x] * math.sqrt(64))
    agree(model(x).logits, by_the_paper(model, x, steps, top))


@pytest.mark.parametrize("backbone", FAMILIES)
def test_no_steps_are_the_backbone_bit_for_bit(backbone: str):
    model, x = build("PonderLM(steps=0, start='steps')", backbone, init="hf"), ids(2, 9)
    assert torch.equal(model(x).logits, model.backbone.lm(x).logits)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_full_recompute_is_cached_decoding_with_a_cache_per_pass(backbone: str):
    model, x = build("PonderLM(steps=3, top_k=10)", backbone), ids(2, 9)
    cache = model.new_cache()
    pieces = [model(piece, past_key_values=cache).logits for piece in x.split([4, 1, 1, 3], dim=1)]
    agree(torch.cat(pieces, dim=1), model(x).logits)
    assert all([part[0].shape[-2] for part in layer.parts] == [9] * 4 for layer in cache.layers)
    assert cache.passes_BT.unique().tolist() == [4]


def test_full_recompute_is_cached_decoding_in_bf16():
    model, x = build("PonderLM(steps=3, top_k=None)").to(torch.bfloat16), ids(2, 9)
    cache = model.new_cache()
    pieces = [model(x[:, :4], past_key_values=cache).logits]
    pieces += [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(4, 9)]
    whole = model(x).logits
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("backbone", FAMILIES)
def test_certain_and_uniform_predictions_mix_what_they_say(backbone: str):
    model, x = build("PonderLM(steps=1, top_k=None)", backbone), ids(2, 5)
    table = model.backbone.embed(torch.arange(VOCAB))
    for logits, mixed in (
        (torch.nn.functional.one_hot(torch.tensor(7), VOCAB) * 1e4, table[7]),
        (torch.zeros(VOCAB), table.mean(0)),
    ):
        model.backbone.head = lambda h, logits=logits: logits.to(h).expand(*h.shape[:-1], VOCAB)
        first, second = inputs_of_each_pass(model, x)
        agree(second, first + mixed)


def test_the_mixture_of_all_tokens_is_the_whole_mixture():
    whole, picked, fewer = (build(f"PonderLM(steps=2, top_k={top})") for top in (None, VOCAB, VOCAB // 3))
    x = ids(2, 9)
    assert torch.equal(whole(x).logits, picked(x).logits)
    picked.think.feedback._whole = False  # as if there were more tokens still: all are picked, one by one
    agree(whole(x).logits, picked(x).logits)
    assert (whole(x).logits - fewer(x).logits).abs().max() > 1e-4


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_no_mixture_leaks_the_future(backbone: str, steps: int):
    model, x = build(f"PonderLM(steps={steps}, top_k=10)", backbone), ids(1, 9)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % VOCAB
    before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("backbone", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("top", [None, 10])
def test_gradient_reaches_the_head_through_the_mixture(backbone: str, top: int | None):
    for steps in (0, 2):
        model, x = build(f"PonderLM(steps={steps}, top_k={top})", backbone).train(), ids(2, 6)
        head = model.get_output_embeddings().weight
        with torch.enable_grad():
            batch = TokenBatch(model.backbone.embed(x), torch.arange(6)[None])
            thought = model.think(model.backbone, batch)
            logits = thought.h_BTD @ head.detach().T
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
        assert (head.grad is None) == (steps == 0)
        if steps:
            assert head.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", FAMILIES)
def test_padding_is_masked_in_every_pass_and_its_mixtures_are_not_read(backbone: str):
    model, x = build("PonderLM(steps=2, top_k=10)", backbone), ids(1, 5)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    for seed in (2, 3):
        padded = torch.cat([ids(1, 3, seed), x], dim=1)
        agree(model(padded, attention_mask=mask).logits[:, 3:], model(x).logits)


def test_training_runs_plain_causal_passes(monkeypatch):
    model, x = build("PonderLM(steps=2, top_k=10)").train(), ids(2, 6)
    calls = []
    monkeypatch.setattr(
        Backbone, "step", lambda self, h, cache, mask, positions: calls.append((cache, mask)) or h.clone()
    )
    model(x, labels=x)
    assert calls == [(None, None)] * 3


def test_recomputing_activations_changes_no_gradient():
    model, x = build("PonderLM(steps=2, top_k=10)").train(), ids(2, 6)
    found = []
    for recompute in (False, True):
        if recompute:
            checkpoint_activations(model)
        model.zero_grad()
        with torch.enable_grad():
            model(x, labels=x).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert model.think.supports_recompute and is_checkpointing(model.backbone.lm)
    for name, gradient in found[0].items():
        agree(found[1][name], gradient)


def test_the_start_may_be_the_embedding_many_times():
    once, often = build("PonderLM(steps=3, top_k=10)"), build("PonderLM(steps=3, top_k=10, start='steps')")
    x = ids(2, 6)
    agree(inputs_of_each_pass(often, x)[0], 3 * inputs_of_each_pass(once, x)[0])
    assert (often(x).logits - once(x).logits).abs().max() > 1e-3


def test_a_smaller_budget_is_the_model_with_fewer_steps():
    model, fewer, x = build("PonderLM(steps=3, top_k=10)"), build("PonderLM(steps=1, top_k=10)"), ids(2, 6)
    out = model(x, max_passes=2)
    assert torch.equal(out.logits, fewer(x).logits) and out.passes.unique().tolist() == [2]


@pytest.mark.parametrize("backbone", FAMILIES)
def test_calls_on_one_cache_may_differ_in_budget(backbone: str, monkeypatch):
    """Tokens that got fewer passes show their last rows at all later depths, as tokens of AdaPonderLM that left off."""
    model, x = build("PonderLM(steps=3, top_k=10)", backbone), ids(2, 9)
    cache, pieces = model.new_cache(), []
    for begin, end, most in ((0, 3, 2), (3, 6, 4), (6, 7, 1), (7, 8, 3), (8, 9, 4)):
        pieces.append(model(x[:, begin:end], past_key_values=cache, max_passes=most).logits)
    took_T = torch.tensor([2, 2, 2, 4, 4, 4, 1, 3, 4])
    assert torch.equal(cache.passes_BT, took_T.expand(2, -1))
    halting = build("AdaPonderLM(steps=3, top_k=10, halting='random')", backbone)
    monkeypatch.setattr(halting.think.halting, "continue_mask", lambda depth, *others: took_T[None] > depth)
    agree(torch.cat(pieces, dim=1), halting(x).logits)


def test_states_of_every_pass_are_recorded():
    model, x = build("PonderLM(steps=2, top_k=10)"), ids(2, 6)
    model.think.record = True
    out = model(x)
    assert len(out.trace["states"]) == 3
    assert torch.equal(model.backbone.head(out.trace["states"][-1]), out.logits)


class TestTraps:
    """What looks like it and is not; each must show, or the tests above guard nothing."""

    def test_mixtures_add_up(self):
        model, x = build("PonderLM(steps=3, top_k=None)"), ids(2, 6)
        assert (model(x).logits - by_the_paper(model, x, 3, accumulate=False)).abs().max() > 1e-3

    def test_one_cache_for_all_passes_is_not_enough(self):
        model, x = build("PonderLM(steps=3, top_k=10)"), ids(1, 6)
        right, cache = model(x).logits[:, -1], model.new_cache()
        model(x[:, :5], past_key_values=cache)
        for layer in cache.layers:
            layer.parts = [layer.parts[0]] * 4
        assert (model(x[:, 5:], past_key_values=cache).logits[:, -1] - right).abs().max() > 1e-3

    def test_rows_come_from_the_input_table_and_weights_from_the_head(self):
        model, x = build("PonderLM(steps=2, top_k=None)"), ids(2, 6)
        lm = model.backbone.lm
        assert lm.get_input_embeddings().weight is not lm.get_output_embeddings().weight
        right, scale = model(x).logits, model.config.embed_scale
        model.backbone.mix_embeddings = lambda weights: weights @ lm.get_output_embeddings().weight * scale
        assert (model(x).logits - right).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("PonderLM(steps=-1)", "steps=-1"),
        ("PonderLM(top_k=0)", "top_k=0"),
        ("PonderLM(start='step')", "did you mean 'steps'"),
    ],
)
def test_bad_arguments_say_what_to_type(spec: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        build(spec)

"""The Universal Transformer's own invariants: what ACT adds up, who halts when, and what the halted leave behind."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import DynamicCache
from pondera.methods.think.common import halting_think

FAMILIES = ["llama", "gemma3", "gpt2"]  # llama and gemma3 share keys among heads


@copies
def build(backbone: str = "llama", arguments: str = "steps=3", think: str = "", **config) -> AdaptiveLM:
    """A model in which what decides does differ among tokens."""
    torch.manual_seed(0)
    think = think or f"UniversalTransformer({arguments})"
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), think=think, **config)).eval()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.think.parameters():
            parameter.normal_(std=0.3, generator=generator)
        if hasattr(model.think, "halting_unit"):
            model.think.halting_unit.bias.fill_(-0.8)
    return model


def saying(*logits: float, arguments: str = "steps=3", backbone: str = "llama") -> AdaptiveLM:
    """A model whose halting unit says the same for every token: these logits, pass by pass."""
    model, said = build(backbone, arguments), iter(logits)
    model.think.halting_unit.forward = lambda state_BTD: torch.full_like(state_BTD[..., :1], next(said))
    return model


def logit(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64).logit())


@pytest.fixture
def weights(monkeypatch) -> list[torch.Tensor]:
    """The weights of the latest prediction's states, ``[passes, B, T]``."""
    found: list[torch.Tensor] = []
    original = halting_think.mixture

    def spy(states, masses):
        found[:] = [torch.stack(masses)]
        return original(states, masses)

    monkeypatch.setattr(halting_think, "mixture", spy)
    return found


def slow(model: AdaptiveLM, x_1T: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The definition, token by token: an ordinary cache per pass; the halted copy their last rows into the others."""
    think, backbone = model.think, model.backbone
    caches, outputs, taken = [DynamicCache() for _ in range(think.steps + 1)], [], []
    for position, token in enumerate(x_1T[0]):
        state, total, output = backbone.embed(token[None, None]), 0.0, 0.0
        for number, cache in enumerate(caches):
            given = state if number == 0 else state * think.feedback.scale + think.signal_ND[number - 1]
            state = backbone.decoder(
                inputs_embeds=given, past_key_values=cache, position_ids=torch.tensor([[position]]), use_cache=True
            ).last_hidden_state
            probability = float(torch.sigmoid(think.halting_unit(state)))
            last = total + probability >= 1 - think.epsilon or number == think.steps
            output = output + (1 - total if last else probability) * state
            total += probability
            if last:
                break
        for above in caches[number + 1 :]:
            for index, layer in enumerate(caches[number].layers):
                above.update(layer.keys[:, :, -1:], layer.values[:, :, -1:], index)
        outputs.append(output)
        taken.append(number + 1)
    return backbone.head(torch.cat(outputs, dim=1)), taken


@pytest.mark.parametrize("backbone", [*FAMILIES, "gpt_neox"])
@torch.no_grad()
def test_it_equals_the_slow_definition(backbone: str):
    model, x = build(backbone), ids(1, 14)
    expected, taken = slow(model, x)
    out = model(x)
    assert out.passes[0].tolist() == taken and len(set(taken)) > 1
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_training_is_token_by_token_decoding(backbone: str):
    model = build(backbone)
    x, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :7] = 0, 0
    together = model.train()(x, attention_mask=mask).logits
    cache, pieces = model.eval().new_cache(), []
    for t in range(9):
        pieces.append(model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    alone = torch.cat(pieces, dim=1)
    torch.testing.assert_close(together[mask.bool()], alone[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [{}, {"effort": 0.4}, {"max_passes": 2}])
@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_weights_sum_to_one(backbone: str, budget: dict, weights):
    model, x = build(backbone), ids(2, 12)
    out = model(x, **budget)
    torch.testing.assert_close(weights[0].sum(0), torch.ones(2, 12), atol=1e-6, rtol=0)
    numbers = torch.arange(1, len(weights[0]) + 1)[:, None, None]
    assert bool((weights[0] >= 0).all()) and bool((weights[0] > 0).eq(numbers <= out.passes).all())


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ((0.3, 0.3, 0.5), (0.3, 0.3, 0.4)),
        ((0.3, 0.3, 0.3, 0.05), (0.3, 0.3, 0.3, 0.1)),  # R passes are all there are
        ((0.995,), (1.0,)),
        ((0.9, 0.0895, 0.5), (0.9, 0.0895, 0.0105)),  # 0.9895 does not reach 0.99
        ((0.9, 0.0905), (0.9, 0.1)),
    ],
)
@torch.no_grad()
def test_the_last_pass_takes_the_remainder(probabilities, expected, weights):
    model, x = saying(*map(logit, probabilities)), ids(1, 4)
    model.think.record = True
    out = model(x)
    assert out.passes.unique().tolist() == [len(expected)]
    torch.testing.assert_close(weights[0][:, 0, 0], torch.tensor(expected), atol=1e-6, rtol=0)
    mean = sum(weight * state for weight, state in zip(expected, out.trace["states"], strict=True))
    torch.testing.assert_close(out.logits, model.backbone.head(mean), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_reaching_the_threshold_exactly_is_enough():
    assert saying(0.0, 0.0, arguments="epsilon=0.5")(ids(1, 3)).passes.unique().tolist() == [1]


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_a_token_without_doubt_leaves_the_backbone_as_it_is(backbone: str):
    model, plain, x = saying(20.0, backbone=backbone), build(backbone, think="PauseToken(0)"), ids(2, 8)
    assert torch.equal(model(x).logits, plain(x).logits)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_what_has_halted_stays_bit_for_bit(backbone: str):
    """Its state, and the keys and values that it shows to others."""
    model, x = build(backbone), ids(2, 12)
    model.think.record = True
    cache = model.new_cache()
    out = model(x[:, :9], past_key_values=cache)
    for depth, (before, after) in enumerate(pairwise(out.trace["states"]), start=1):
        assert torch.equal((before == after).all(-1), out.passes <= depth)
    model(x[:, 9:], past_key_values=cache)
    assert len(cache.passes_BT.unique()) > 1
    for layer in cache.layers:
        for depth in range(1, model.think.steps + 1):
            for below, own in zip(layer.parts[depth - 1], layer.parts[depth], strict=True):
                assert torch.equal((below == own).all(-1).all(1), cache.passes_BT <= depth)


@torch.no_grad()
def test_the_limit_cuts_off_and_gives_the_remainder_to_the_last_pass(weights):
    model, x = saying(*[logit(0.25)] * 3), ids(1, 5)
    assert model(x, max_passes=2).passes.unique().tolist() == [2]
    torch.testing.assert_close(weights[0][:, 0, 0], torch.tensor([0.25, 0.75]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("effort", "passes"), [(0, 1), (0.1, 2), (0.3, 4), (0.5, 5), (1, 5)])
@torch.no_grad()
def test_effort_moves_the_threshold(effort: float, passes: int):
    """With p = 0.22 a token halts where 1 - 0.22 n <= 0.01 ** effort: 1, 0.63, 0.25, 0.1, 0.01."""
    model = saying(*[logit(0.22)] * 4, arguments="steps=4")
    assert model(ids(1, 3), effort=effort).passes.unique().tolist() == [passes]


def test_the_ponder_cost_is_passes_and_remainder_and_teaches_through_the_remainder_only():
    model, x = build().train(), ids(2, 10)
    said: list[torch.Tensor] = []

    def keep(module, inputs, output):
        output.retain_grad()
        said.append(output)

    model.think.halting_unit.register_forward_hook(keep)
    out = model(x, labels=x)
    term, passes = out.terms["ponder"], out.passes
    probability = torch.stack([each[..., 0] for each in said]).sigmoid()
    number = torch.arange(len(said))[:, None, None]
    before_last = number < passes - 1
    expected = (passes + 1 - (probability * before_last).sum(0)).sum()
    torch.testing.assert_close(term.sum, expected)
    assert term.count == 20 and term.weight == 0.01 and len(passes.unique()) > 1
    term.sum.backward()
    # The number of passes has no slope, so each but a token's last is worth what it takes from the remainder.
    for each, slope in zip(said, -probability * (1 - probability) * before_last, strict=True):
        torch.testing.assert_close(torch.zeros_like(each) if each.grad is None else each.grad, slope[..., None])


def test_pondering_costs_where_there_is_no_padding():
    model = saying(*[logit(0.25)] * 3).train()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    term = model(ids(2, 4), attention_mask=mask, labels=ids(2, 4)).terms["ponder"]
    assert term.count == 6
    torch.testing.assert_close(term.sum, torch.tensor(6 * 4.25))


def test_the_halting_unit_learns_from_both_losses():
    model, x = build().train(), ids(2, 10)
    out = model(x, labels=x)
    of_loss, of_cost = (
        torch.autograd.grad(out.terms[name].sum, model.think.halting_unit.weight, retain_graph=True)[0]
        for name in ("next_token", "ponder")
    )
    assert of_loss.abs().max() > 0 and of_cost.abs().max() > 0


@torch.no_grad()
def test_no_signal_enters_the_first_pass_and_its_own_each_later_one():
    model, x, given = build(arguments="steps=2, halting='fixed'"), ids(1, 5), []
    original = model.backbone.step
    model.backbone.step = lambda h, *rest: given.append(h) or original(h, *rest)
    model.think.record = True
    states = model(x).trace["states"]
    assert torch.equal(given[0], model.backbone.embed(x))
    for number, (state, entered) in enumerate(zip(states, given[1:], strict=False)):
        expected = state * model.think.feedback.scale + model.think.signal_ND[number]
        torch.testing.assert_close(entered, expected, atol=0, rtol=0)


@torch.no_grad()
def test_at_first_all_passes_are_taken_at_equal_weights(weights):
    torch.manual_seed(0)
    fresh = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="UniversalTransformer(steps=3)")).eval()
    assert fresh(ids(1, 6)).passes.unique().tolist() == [4]
    torch.testing.assert_close(weights[0], torch.full((4, 1, 6), 0.25))


def test_a_process_whose_tokens_have_halted_still_makes_the_passes_that_others_make(monkeypatch):
    x, calls = ids(2, 6), []
    alone = saying(20.0).train()(x).logits
    model = saying(20.0, 0.0, 0.0).train()
    model.backbone.decoder.layers[0].mlp.up_proj.weight.register_hook(calls.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    out = model(x)
    torch.testing.assert_close(out.logits, alone, atol=0, rtol=0)
    assert out.passes.unique().tolist() == [1]
    out.logits.sum().backward()
    assert len(calls) == 1 and bool(calls[0].isfinite().all())


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_bf16_weights_still_sum_to_one(backbone: str, weights):
    model = build(backbone).to(torch.bfloat16)
    out = model(ids(2, 9))
    assert out.logits.dtype == torch.bfloat16 and weights[0].dtype == torch.float32
    torch.testing.assert_close(weights[0].sum(0), torch.ones(2, 9), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_oracle_sends_on_what_is_wrong():
    model, x = build(arguments="steps=1, halting='oracle'"), ids(2, 10)
    first = model(x, max_passes=1).logits.argmax(-1)
    labels = torch.where(torch.arange(10) % 2 == 0, first, (first + 1) % 97)
    assert torch.equal(model(x, shift_labels=labels).passes == 2, first != labels)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("steps=-1", "steps=-1"),
        ("epsilon=0.0", "epsilon=0.0"),
        ("epsilon=1.5", "epsilon=1.5"),
        ("ponder_cost=-1", "ponder_cost=-1"),
        ("halting='atc'", "did you mean 'act'"),
    ],
)
def test_bad_arguments(arguments: str, match: str):
    with pytest.raises(UserError, match=match):
        build(arguments=arguments)

"""Think-at-Hard's own invariants: who is sent on, what it is fed, how logits add up, and what the decider learns from."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from helpers.fresh_process import copies
from torch.nn import functional as F

from pondera import AdaptiveConfig, AdaptiveLM, UserError

FAMILIES = ["llama", "gemma3", "gpt2"]  # llama and gemma3 share keys among heads


@copies
def build(backbone: str = "llama", arguments: str = "", think: str = "", **fields) -> AdaptiveLM:
    """A model in which what decides does differ among tokens."""
    torch.manual_seed(0)
    think = think or f"ThinkAtHard({arguments})"
    model = AdaptiveLM(AdaptiveConfig(backbone={**copy.deepcopy(BACKBONES[backbone]), **fields}, think=think)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
        for parameter in model.think.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def says(model: AdaptiveLM, logit: float) -> AdaptiveLM:
    """The decider says the same of every token."""
    with torch.no_grad():
        model.think.decider.leave[1].weight.zero_()
        model.think.decider.leave[1].bias.fill_(logit)
    return model


def slow(model: AdaptiveLM, x_1T: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The definition, one slot at a time, with the mask written out, logits added up and mixtures made by hand."""
    think, backbone = model.think, model.backbone
    inputs, where, outputs, taken = [], [], [], []
    for t, token in enumerate(x_1T[0]):
        given, logits = backbone.embed(token[None, None]), 0.0
        for k in range(think.steps + 1):
            inputs.append(given)
            where.append((t, k))
            seen = torch.tensor([[a <= t0 and b <= k0 for a, b in where] for t0, k0 in where])[None, None]
            state = backbone.decoder(
                inputs_embeds=torch.cat(inputs, dim=1),
                attention_mask=dict.fromkeys(backbone.layer_types, seen)
                if len(set(backbone.layer_types)) > 1
                else seen,
                position_ids=torch.tensor([[a for a, _ in where]]),
                use_cache=False,
            ).last_hidden_state[:, -1:]
            logits = logits + backbone.head(state)
            if torch.sigmoid(think.decider(state)) < think.threshold:
                break
            best = logits[0, 0].topk(think.feedback.top_k)
            given = (best.values.softmax(-1) @ backbone.embed(best.indices))[None, None]
        outputs.append(logits)
        taken.append(k + 1)
    return torch.cat(outputs, dim=1), taken


@pytest.mark.parametrize("backbone", [*FAMILIES, "gpt_neox"])
@torch.no_grad()
def test_it_equals_the_slow_definition(backbone: str):
    model, x = build(backbone, "steps=2, top_k=5"), ids(1, 6, seed=4)
    model.think.threshold = float(model.think.decider(model.backbone.step(model.backbone.embed(x))).sigmoid().median())
    expected, taken = slow(model, x)
    out = model(x)
    assert out.passes[0].tolist() == taken and len(set(taken)) > 1
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_a_decider_that_finds_nothing_hard_leaves_the_backbone_as_it_is(backbone: str):
    model, plain, x = says(build(backbone), -9.0), build(backbone, think="PauseToken(0)"), ids(2, 8)
    assert torch.equal(model(x).logits, plain(x).logits)
    assert torch.equal(build(backbone, "halting='fixed'")(x, max_passes=1).logits, plain(x).logits)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_the_oracle_sends_on_exactly_what_is_wrong(backbone: str):
    model, x = build(backbone, "halting='oracle'"), ids(3, 12)
    labels = half_right(model, x)
    wrong = model(x, max_passes=1).logits.argmax(-1) != labels
    assert torch.equal(model(x, shift_labels=labels).passes == 2, wrong) and len(wrong.unique()) == 2


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_labels_route_in_training_and_only_there(backbone: str):
    """Hard is what is labelled and wrong; how it is packed changes nothing."""
    model, x = build(backbone), ids(3, 12)
    labels = half_right(model, x)
    wrong = model(x, max_passes=1).logits.argmax(-1) != labels
    labels[:, 5:8] = -100
    wrong[:, 5:8] = False
    found = []
    for model.think.packed in (True, False):
        found.append(model.train()(x, shift_labels=labels))
        assert torch.equal(found[-1].passes == 2, wrong)
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0].loss, found[1].loss)
    blind = model.eval()(x)
    looking = model(x, shift_labels=labels)
    assert torch.equal(blind.logits, looking.logits) and list(looking.terms) == ["next_token"]


def half_right(model: AdaptiveLM, x: torch.Tensor) -> torch.Tensor:
    """Labels of which the first pass predicts every other one."""
    first = model(x, max_passes=1).logits.argmax(-1)
    return torch.where(torch.arange(x.shape[1]) % 2 == 0, first, (first + 1) % VOCAB)


def test_one_labelled_token_thinks_where_none_is_hard():
    model, x = build().train(), ids(2, 6)
    labels = model(x, max_passes=1).logits.argmax(-1).detach()
    labels[0, :2] = -100
    out = model(x, shift_labels=labels)
    expected = torch.ones_like(x)
    expected[0, 2] = 2
    assert torch.equal(out.passes, expected)
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model(x, shift_labels=torch.full_like(x, -100)).passes.unique().tolist() == [1]


@pytest.mark.parametrize("top", [5, VOCAB])
def test_a_process_without_hard_tokens_still_makes_the_pass_that_others_make(top: int, monkeypatch):
    model, x = build(arguments=f"top_k={top}").train(), ids(2, 6)
    labels, weight = torch.full_like(x, -100), model.backbone.decoder.layers[0].mlp.up_proj.weight
    alone, calls = model(x, shift_labels=labels).logits, []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    weight.register_hook(calls.append)
    out = model(x, shift_labels=labels)
    torch.testing.assert_close(out.logits, alone, atol=0, rtol=0)
    assert out.passes.unique().tolist() == [1] and out.terms["decider"].count == 0
    (out.logits.sum() + out.terms["decider"].sum).backward()
    assert len(calls) == 1 and bool(model.think.decider.enter.weight.grad.eq(0).all())


@torch.no_grad()
def test_what_enters_a_pass_is_the_mixture_of_the_likeliest_and_nothing_else():
    model, x, given = build(arguments="steps=2, halting='fixed', top_k=3"), ids(1, 10), []
    model.think.record = True
    original = model.backbone.step
    model.backbone.step = lambda h, *rest: given.append(h) or original(h, *rest)
    totals = model(x).trace["states"]
    assert torch.equal(given[0], model.backbone.embed(x))
    for total, entered in zip(totals, given[1:], strict=False):
        best = model.backbone.head(total).topk(3)
        expected = (best.values.softmax(-1)[..., None] * model.backbone.embed(best.indices)).sum(-2)
        torch.testing.assert_close(entered, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_next_decision_is_about_what_is_predicted_so_far():
    model, x = build(arguments="steps=2, halting='oracle'"), ids(1, 16)
    model.think.record = True
    first, second, _ = (model.backbone.head(total).argmax(-1) for total in model(x).trace["states"])
    assert bool((first != second).any()), "no prediction changed, so nothing is shown"
    passes = model(x, shift_labels=second).passes
    assert torch.equal(passes == 1, first == second)
    everyone_thinks_once = model(x, shift_labels=torch.where(first == second, (first + 1) % VOCAB, second))
    assert torch.equal(everyone_thinks_once.passes == 2, first != second)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_logits_of_a_token_s_passes_add_up(backbone: str):
    model, x, states = build(backbone, "steps=2, halting='fixed'"), ids(2, 7), []
    original = model.backbone.step
    model.backbone.step = lambda *given: states.append(original(*given)) or states[-1]
    logits = model(x).logits
    assert len(states) == 3
    torch.testing.assert_close(logits, sum(map(model.backbone.head, states)), atol=1e-4, rtol=1e-5)


def test_the_decider_learns_from_its_own_term_and_nothing_else_does():
    model, x = build(arguments="steps=2, positive_weight=3.0").train(), ids(2, 10)
    with torch.no_grad():
        labels = half_right(model, x)
    labels[0, :3] = -100
    out = model(x, shift_labels=labels)
    term = out.terms["decider"]
    known = labels >= 0
    with torch.no_grad():
        state = model.backbone.step(model.backbone.embed(x))
        wrong = out.passes >= 2
        first = F.binary_cross_entropy_with_logits(
            model.think.decider(state)[..., 0][known],
            wrong[known].float(),
            weight=torch.where(wrong[known], 3.0, 1.0),
            reduction="sum",
        )
    assert term.weight == 1 and term.count == known.sum() + wrong.sum(), "each decision that was asked for counts once"
    assert term.sum > first
    of_term = torch.autograd.grad(term.sum, list(model.parameters()), retain_graph=True, allow_unused=True)
    of_loss = torch.autograd.grad(out.terms["next_token"].sum, list(model.parameters()), allow_unused=True)
    for (name, _), decider, rest in zip(model.named_parameters(), of_term, of_loss, strict=True):
        mine = name.startswith("think.decider")
        assert (decider is not None) == mine and (rest is not None) == (not mine), name


def test_the_first_decision_s_loss_by_hand():
    model, x = says(build(arguments="positive_weight=4.0"), 0.7).train(), ids(2, 8)
    with torch.no_grad():
        labels = half_right(model, x)
    probability = torch.sigmoid(torch.tensor(0.7))
    expected = -8 * 4 * probability.log() - 8 * (1 - probability).log()
    term = model(x, shift_labels=labels).terms["decider"]
    assert term.count == 16
    torch.testing.assert_close(term.sum, expected)


def test_padding_is_no_lesson():
    model, x = build().train(), ids(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    out = model(x, attention_mask=mask, shift_labels=(x + 1) % VOCAB)
    assert out.terms["decider"].count == 9 and int(out.passes[0, :3].max()) == 1


@torch.no_grad()
def test_the_decider_learns_to_route():
    """A few steps on what it is asked make it right about it: the features say enough."""
    model, x = build(arguments="positive_weight=1.0").train(), ids(4, 16)
    labels = (model(x, max_passes=1).logits.argmax(-1) + x % 2) % VOCAB
    optimizer = torch.optim.Adam(model.think.decider.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        with torch.enable_grad():
            losses.append(model(x, shift_labels=labels).terms["decider"].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    model.think.threshold = 0.5
    assert ((model.eval()(x).passes == 2) == (x % 2 == 1)).double().mean() > 0.8


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_bf16_runs_and_routes_by_labels(backbone: str):
    model, x = build(backbone, "top_k=7").to(torch.bfloat16).train(), ids(2, 9)
    labels = half_right(model, x)
    out = model(x, shift_labels=labels)
    assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()
    assert torch.equal(out.passes[0] == 2, torch.arange(9) % 2 == 1)


@pytest.mark.parametrize("backbone", FAMILIES)
@torch.no_grad()
def test_training_on_one_text_is_decoding_it(backbone: str):
    """Where labels and decider agree, training, prefill and decoding are one function."""
    model, x = build(backbone, "halting='oracle'"), ids(2, 9)
    labels = half_right(model, x)
    whole = model.train()(x, shift_labels=labels).logits
    cache = model.eval().new_cache()
    pieces = [model(x[:, t : t + 1], shift_labels=labels[:, t : t + 1], past_key_values=cache).logits for t in range(9)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
    rows = [[part[0].shape[-2] for part in layer.parts] for layer in cache.layers]
    assert rows == [[9, 4]] * len(rows), "who stopped has no row further up"


@pytest.mark.parametrize(("backbone", "fields", "what"), [
    ("gemma3", {"final_logit_softcapping": 30.0}, "soft-caps logits"),
    ("phi", {"model_type": "phi"}, "has a bias"),
])  # fmt: skip
def test_heads_whose_logits_do_not_add_up_are_refused(backbone: str, fields: dict, what: str, monkeypatch):
    monkeypatch.setitem(BACKBONES, "phi", BACKBONES["llama"])
    with pytest.raises(UserError, match=rf"ThinkAtHard does not fit \w+: its head {what}"):
        build(backbone, **fields)
    assert build(backbone, "steps=0", **fields)(ids(1, 3)).passes.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("steps=-1", "steps=-1"),
        ("threshold=1.0", "threshold=1.0"),
        ("top_k=0", "top_k=0"),
        ("decider_width=0", "decider_width=0"),
        ("decider_layers=-1", "decider_layers=-1"),
        ("positive_weight=0", "positive_weight=0"),
        ("halting='dicider'", "did you mean 'decider'"),
    ],
)
def test_bad_arguments(arguments: str, match: str):
    with pytest.raises(UserError, match=match):
        build(arguments=arguments)

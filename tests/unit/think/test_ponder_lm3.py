"""PonderLM-3's own invariants: soft and hard slots, two routes to the router, and the traps of a weighted cache."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cost.measure import measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule
from pondera.methods.think.ponder_lm3 import tail_masses

FAMILIES = ["llama", "gemma3", "gpt_neox", "gpt2"]  # grouped heads, windows, partial rotation, learned positions


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@copies
def build(think: str | None, backbone: str = "llama", spread: float = 0.3) -> AdaptiveLM:
    """A model whose tokens differ: its router's weights have the standard deviation `pad`."""
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]), think=think, init="scaled")).eval()
    if hasattr(model.think, "router"):
        for parameter in model.think.router.parameters():
            parameter.normal_(std=spread, generator=torch.Generator().manual_seed(3))
    return model


def all_mass_on(model: AdaptiveLM, number: int) -> AdaptiveLM:
    router = model.think.router
    router.weight.zero_()
    router.bias.copy_(1e4 * (torch.arange(len(router.bias)) == number))
    return model


def twin(model: AdaptiveLM, think: str | None) -> AdaptiveLM:
    """The same backbone with another method."""
    other = AdaptiveLM(AdaptiveConfig(backbone=model.config.backbone, think=think, init="scaled")).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def by_token(model: AdaptiveLM, x: torch.Tensor, **options) -> torch.Tensor:
    cache = model.new_cache()
    return torch.cat([model(x[:, t : t + 1], past_key_values=cache, **options).logits for t in range(x.shape[1])], 1)


# 1 and 2: the two ends of the router


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("form", ["router", "fixed"])
def test_all_mass_on_the_last_slot_is_ponderlm2(backbone: str, form: str):
    model, x = build(f"PonderLM3(thoughts=2, halting='{form}')", backbone), ids(2, 6)  # 6: no longer than a window
    if form == "router":
        all_mass_on(model, 2)
    older = twin(model, "PonderLM2(thoughts=2)")
    for rounds in (0, 3, "exact"):
        model.think.eval_rounds = older.think.eval_rounds = rounds
        agree(model(x).logits, older(x).logits)
        assert model(x).passes.unique().tolist() == [3]
    agree(by_token(model, x), by_token(older, x))
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    agree(model(x, attention_mask=padded).logits[0, 2:], older(x, attention_mask=padded).logits[0, 2:])
    for lm in (model, older):
        lm.train().begin_step(3, seed=5)
    agree(model(x).logits, older(x).logits)


@pytest.mark.parametrize("backbone", [*FAMILIES, "mistral", "qwen3_mixed"])
def test_all_mass_on_slot_zero_is_the_backbone_bit_for_bit(backbone: str):
    model, x = all_mass_on(build("PonderLM3(thoughts=2)", backbone), 0), ids(2, 9)
    plain = twin(model, None)
    out = model(x)
    assert torch.equal(out.logits, plain(x).logits) and out.passes.unique().tolist() == [1]
    agree(by_token(model, x), plain(x).logits)
    model.think.threshold = 1e-9
    agree(model.train()(x).logits, plain(x).logits)  # training runs all slots, at next to no weight


# 3: masses


def test_masses_fall_from_one_and_sum_to_the_expected_number():
    log_share = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).mul(8).log_softmax(-1)
    mass = tail_masses(log_share).exp()
    assert torch.equal(mass[..., 0], torch.ones(2, 5)) and bool((mass.diff(dim=-1) <= 1e-6).all())
    agree(mass[..., 1:].sum(-1), (log_share.exp() * torch.arange(4)).sum(-1))
    extreme = tail_masses(torch.tensor([0.0, -1e4, -2e4]))
    assert torch.equal(extreme, torch.tensor([0.0, -1e4, -2e4])), "far below what a float32 probability can say"


# 5: what dropping costs


@pytest.mark.parametrize("backbone", FAMILIES)
def test_dropping_slots_changes_no_more_than_their_mass(backbone: str):
    model, x = build("PonderLM3(thoughts=2, train_rounds=(16, 16), eval_rounds=16)", backbone, spread=0.6), ids(3, 8)
    gaps, kept = {}, {}
    for tau in (0.3, 1e-2, 1e-4):
        model.think.threshold = tau
        soft, hard = model.train()(x).logits, model.eval()(x)
        gaps[tau], kept[tau] = float((soft - hard.logits).abs().max()), float(hard.passes.double().mean())
    assert kept[0.3] < kept[1e-2] < kept[1e-4] < 3, "slots are dropped at every threshold"
    assert gaps[1e-4] < 1e-3 < 1e-2 < gaps[0.3] and gaps[1e-4] < gaps[1e-2] < gaps[0.3]


@pytest.mark.parametrize("backbone", [*FAMILIES, "mistral", "qwen3_mixed"])
def test_where_nothing_is_dropped_training_is_decoding(backbone: str):
    """In parallel, weights in the dot product, against one slot at a time, weights added and kept in the cache."""
    model, x = build("PonderLM3(thoughts=2, train_rounds=(18, 18), threshold=1e-30)", backbone), ids(2, 9)
    together = model.train()(x).logits
    agree(together, by_token(model.eval(), x), 3e-5)
    for step in (0, 1):
        model.think.train_rounds = (step, step)
        model.begin_step(step, 0)
        assert (model.train()(x).logits - together).abs().max() > 1e-4, "too few rounds must show"


@pytest.mark.parametrize("backbone", ["llama", "mistral"])
def test_training_with_padding_and_documents_is_each_alone(backbone: str):
    model, x = build("PonderLM3(thoughts=2)", backbone).train(), ids(1, 11)
    alone = [model(piece).logits for piece in x.split([4, 7], dim=1)]
    documents = torch.tensor([[1] * 4 + [2] * 7])
    agree(model(x, document_ids=documents).logits, torch.cat(alone, dim=1))
    padded = model(x, attention_mask=torch.tensor([[0] * 4 + [1] * 7]))
    agree(padded.logits[:, 4:], alone[1])
    assert padded.passes[0, :4].tolist() == [1] * 4


# 6 and 7: hard slots, however they are run


@pytest.mark.parametrize("backbone", [*FAMILIES, "mistral"])
def test_prefill_with_dropped_slots_packed_or_masked_or_alone(backbone: str):
    model = build("PonderLM3(thoughts=2, threshold=0.1, eval_rounds=2)", backbone)
    rows = [ids(1, n, seed=n)[0] for n in (7, 3, 5)]
    x = torch.stack([torch.cat([torch.zeros(7 - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(7) >= 7 - len(row) for row in rows]).long()

    def run(packed: bool, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        model.think.packed = packed
        cache = model.new_cache()
        first = model(x[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        assert len(first.passes.unique()) > 1 or len(x) == 1
        return torch.cat([first.logits, model(x[:, -1:], attention_mask=mask, past_key_values=cache).logits], dim=1)

    packed, masked = run(True, x, mask), run(False, x, mask)
    agree(packed[mask > 0], masked[mask > 0])
    for row, logits in zip(rows, packed, strict=True):
        agree(logits[-len(row) :], run(True, row[None], torch.ones(1, len(row)))[0])


@pytest.mark.parametrize("backbone", [*FAMILIES, "mistral"])
@pytest.mark.parametrize("halting", ["router", "random"])
def test_rounds_reach_the_roll_out_with_the_same_slots(backbone: str, halting: str):
    model, x = build(f"PonderLM3(thoughts=2, threshold=0.1, halting='{halting}')", backbone), ids(2, 7)

    def run(rounds: int | str):
        model.think.eval_rounds = rounds
        return model(x)

    exact, enough = run("exact"), run(14)
    assert torch.equal(exact.passes, enough.passes) and len(exact.passes.unique()) > 1
    agree(exact.logits, enough.logits, 2e-5)
    agree(run(0).logits[:, :1], exact.logits[:, :1], 2e-5)  # the first token's are exact after the guess
    gaps = [float((run(rounds).logits - exact.logits).abs().max()) for rounds in (0, 4)]
    assert gaps[0] > 1e-4 and gaps[0] > gaps[1]


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gpt_neox"])
def test_a_roll_out_written_out(backbone: str):
    """The oracle: an explicit list of slots, weights added by hand."""
    model, x = build("PonderLM3(thoughts=2, threshold=0.1, eval_rounds='exact')", backbone), ids(1, 6)
    think, lm = model.think, model.backbone
    inputs, at, weights, predicted, counts = [], [], [], [], []

    def run(z: torch.Tensor, token: int, weight: torch.Tensor) -> torch.Tensor:
        inputs.append(z)
        at.append(token)
        weights.append(weight)
        order = torch.arange(len(at))
        added = torch.stack(weights).log().expand(len(at), -1).masked_fill(order[:, None] < order, -torch.inf)
        return lm.decoder(
            inputs_embeds=torch.cat(inputs, dim=1),
            attention_mask=added[None, None],
            position_ids=torch.tensor([at]),
            use_cache=False,
        ).last_hidden_state[:, -1:]

    for t in range(6):
        states = [run(lm.embed(x[:, t : t + 1]), t, torch.ones(()))]
        share = think.router(states[0])[0, 0].softmax(-1)
        mass = share.flip(-1).cumsum(-1).flip(-1)
        count = int((mass >= 0.1).sum())
        for k in range(1, count):
            states.append(run(think.feedback(lm, states[-1]), t, mass[k]))
        predicted.append(sum(s * h for s, h in zip(share[:count] / share[:count].sum(), states, strict=True)))
        counts.append(count)
    out = model(x)
    assert out.passes.tolist() == [counts] and len(set(counts)) > 1
    agree(out.logits, lm.head(torch.cat(predicted, dim=1)))


# 8: what teaches the router


def router_gradient(model: AdaptiveLM, **detached: bool) -> torch.Tensor:
    """With one of the two routes cut."""
    think, original = model.think, model.think._route

    def cut(new, state_BTD=None):
        route = original(new, state_BTD)
        for name in detached:
            value = getattr(route, name)
            setattr(route, name, value if value is None else value.detach())
        return route

    think._route = cut
    try:
        with torch.enable_grad():
            x = ids(2, 8)
            out = model(x, labels=x)
            if not out.terms["next_token"].sum.requires_grad:
                return torch.zeros(1)
            gradient = torch.autograd.grad(out.terms["next_token"].sum, think.router.weight, allow_unused=True)[0]
    finally:
        del think._route
    return torch.zeros(1) if gradient is None else gradient


@pytest.mark.parametrize("backbone", FAMILIES)
def test_each_route_alone_teaches_the_router(backbone: str):
    model = build("PonderLM3(thoughts=2)", backbone).train()
    both = router_gradient(model)
    mask_alone = router_gradient(model, share_BTN=True)
    mixture_alone = router_gradient(model, log_weight_BTN=True)
    neither = router_gradient(model, share_BTN=True, log_weight_BTN=True)
    assert all(gradient.abs().max() > 1e-6 for gradient in (both, mask_alone, mixture_alone))
    assert not torch.allclose(mask_alone, mixture_alone) and neither.abs().max() == 0


def test_a_weight_is_taught_by_later_tokens():
    """The loss of the last token alone moves the router by what the slots of tokens before it weigh."""
    model, x = build("PonderLM3(thoughts=1, train_rounds=(1, 1))").train(), ids(1, 6)
    labels = torch.full_like(x, -100)
    labels[0, -1] = 7
    weights: list[torch.Tensor] = []
    original = model.think._route

    def keep(new, state_BTD=None):
        route = original(new, state_BTD)
        if state_BTD is not None:
            route.log_weight_BTN.retain_grad()
            weights.append(route.log_weight_BTN)
        return route

    model.think._route = keep
    with torch.enable_grad():
        model(x, labels=labels).terms["next_token"].sum.backward()
    assert bool((weights[-1].grad[0, :-1, 1].abs() > 1e-9).all())


def test_the_penalty_is_the_expected_number_and_grows():
    model, x = build("PonderLM3(thoughts=3, penalty=0.2, warmup=0.1)").train(), ids(2, 8)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    weights = []
    for step in (0, 5, 10, 99):
        model.begin_step(step, seed=0, progress=step / 100)
        term = model(x, attention_mask=mask, labels=x).terms["thinking"]
        weights.append(term.weight)
    assert weights == pytest.approx([0.0, 0.1, 0.2, 0.2]) and int(term.count) == 11
    for number in (0, 1, 3):
        mean = all_mass_on(model, number)(x, labels=x).terms["thinking"].mean()
        assert float(mean) == pytest.approx(number, abs=3e-4)  # slots weigh the threshold at least
    assert "thinking" not in model.eval()(x, labels=x).terms
    fixed = build("PonderLM3(thoughts=1, halting='fixed')").train()
    assert "thinking" not in fixed(x, labels=x).terms
    at_once = build("PonderLM3(penalty=0.2, warmup=0)").train()
    assert at_once(x, labels=x).terms["thinking"].weight == 0.2


def test_training_starts_close_to_ponderlm2():
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="PonderLM3()", init="scaled"))
    share = model.think.router(torch.randn(5, 64)).softmax(-1)
    agree(share, torch.tensor([[0.1 / 3] * 3 + [0.9]]).expand(5, 4))
    model.begin_step(0, 0)
    assert model(ids(2, 6)).passes.unique().tolist() == [4]


# What the controls do


def test_random_control_spends_as_it_is_told_and_follows_from_positions_and_tokens():
    model, x = build("PonderLM3(thoughts=2, halting='random', continue_prob=0.5)"), ids(4, 32)
    passes = model(x).passes
    assert torch.equal(passes.roll(1, 0), model(x.roll(1, 0)).passes) and not torch.equal(passes[0], passes[1])
    assert float(passes.double().mean()) == pytest.approx(1 + 0.5 + 0.25, abs=0.3)
    model.train()
    drawn = []
    for step in (1, 2):
        model.begin_step(step, seed=0)
        drawn.append(model(x).passes)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(model.eval()(x).passes, passes), "what training drew is forgotten"


def test_a_control_reads_the_last_state_it_kept_at_full_weight():
    model, x = build("PonderLM3(thoughts=2, halting='random', eval_rounds='exact')"), ids(1, 8)
    model.think.record = True
    cache = model.new_cache()
    out = model(x, past_key_values=cache)
    states = torch.stack(out.trace["states"], dim=2)
    last = states[0, torch.arange(8), out.passes[0] - 1]
    agree(out.logits[0], model.backbone.head(last))
    assert cache.depths[0].log_weight_BC is None and len(out.passes.unique()) > 1


def test_routing_once_goes_by_what_the_backbone_says():
    model, x = build("PonderLM3(thoughts=2, threshold=0.1, refresh='once')"), ids(2, 12)
    share = model.think.router(twin(model, None).backbone.step(model.backbone.embed(x))).softmax(-1)
    expected = (share.flip(-1).cumsum(-1) >= 0.1).sum(-1)
    assert torch.equal(model(x).passes, expected)
    model.think.refresh = "round"
    assert not torch.equal(model(x).passes, expected)


# Budgets and prices


def test_one_cache_takes_calls_of_different_budgets():
    model, x = build("PonderLM3(thoughts=2, threshold=0.01, eval_rounds='exact')"), ids(2, 9)
    budgets = [{"effort": 0.3}] * 3 + [{}] * 3 + [{"max_passes": 1}] * 3

    def run(packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.think.packed = packed
        cache = model.new_cache()
        pieces = [model(x[:, t : t + 1], past_key_values=cache, **budgets[t]).logits for t in range(9)]
        return torch.cat(pieces, dim=1), cache.passes_BT

    (packed, passes), (masked, _) = run(True), run(False)
    agree(packed, masked)
    assert passes[:, :3].double().mean() < passes[:, 3:6].double().mean() and passes[:, 6:].max() == 1
    cache = model.new_cache()
    pieces = [model(x[:, 3 * n : 3 * n + 3], past_key_values=cache, **budgets[3 * n]).logits for n in range(3)]
    agree(torch.cat(pieces, dim=1), packed)


def test_no_mass_left_under_a_budget_is_no_nan():
    model, x = all_mass_on(build("PonderLM3(thoughts=2)"), 2), ids(1, 5)
    for budget in ({"max_passes": 1}, {"max_passes": 2}, {"effort": 0}):
        assert model(x, **budget).logits.isfinite().all()


@pytest.mark.parametrize("backbone", ["llama", "gemma3"])
@pytest.mark.parametrize("halting", ["router", "random", "fixed"])
def test_prefill_costs_what_it_says(backbone: str, halting: str):
    model = build(f"PonderLM3(thoughts=2, threshold=0.1, halting='{halting}', eval_rounds=3)", backbone)
    x = ids(1, 16)
    think, outputs = model.think, []
    spent = measured_flops(lambda: outputs.append(model(x)))
    passes = outputs[0].passes
    shares = [float((passes > k).double().mean()) for k in range(3)]
    schedule = CostSchedule(tuple(think.cost_schedule(16, shares=shares)), head_rows=16, tokens=16)
    # Rounds before the last may keep a few slots more or less.
    assert spent == pytest.approx(CostModel(model.backbone.config).forward(schedule), rel=0.05)
    assert think.slots(16, shares) == pytest.approx(int(passes.sum()))
    if halting == "fixed":
        older = twin(model, "PonderLM2(thoughts=2, eval_rounds=3)").think
        calls = [(call.queries, call.keys, call.repeats) for call in think.cost_schedule(16)]
        assert calls == [(call.queries, call.keys, call.repeats) for call in older.cost_schedule(16)]
        assert (
            think.cost_schedule(16, training=True) == older.cost_schedule(16, training=True) and think.slots(16) == 48
        )


def test_dropped_slots_are_not_run():
    x = ids(1, 24)
    spent = {}
    for number in (0, 1, 2):
        model = all_mass_on(build("PonderLM3(thoughts=2)"), number)
        cache = model.new_cache()
        model(x[:, :20], past_key_values=cache)
        spent[number] = measured_flops(lambda m=model, c=cache: m(x[:, 20:], past_key_values=c))
        assert cache.layers[0].parts[0][0].shape[-2] == 24 * (number + 1)
    assert spent[0] < 0.6 * spent[1] < 0.45 * spent[2]


# Traps: each sprung on purpose, or its guard guards nothing


def filled(model: AdaptiveLM, x: torch.Tensor):
    cache = model.new_cache()
    model(x, past_key_values=cache)
    return cache


@pytest.mark.parametrize("backbone", FAMILIES)
def test_weights_must_stay_in_the_cache(backbone: str):
    model, x = build("PonderLM3(thoughts=2, eval_rounds='exact')", backbone), ids(2, 9)
    whole, cache = model(x).logits[:, -1:], filled(model, x[:, :-1])
    agree(model(x[:, -1:], past_key_values=cache).logits, whole)
    forgetful = filled(model, x[:, :-1])
    held = forgetful.depths[0]
    assert held.log_weight_BC.min() < -1 and held.log_weight_BC.isfinite().all()
    held.log_weight_BC = torch.zeros_like(held.log_weight_BC)
    assert (model(x[:, -1:], past_key_values=forgetful).logits - whole).abs().max() > 1e-3


def test_tokens_own_consecutive_slots_and_share_their_position(monkeypatch):
    model, x = build("PonderLM3(thoughts=2, threshold=0.1, eval_rounds='exact')"), ids(1, 6)
    positions, original = [], model.backbone.step

    def spy(h, cache=None, mask=None, position_ids=None, rows=None):
        positions.extend(position_ids[0].tolist())
        return original(h, cache, mask, position_ids, rows)

    monkeypatch.setattr(model.backbone, "step", spy)
    cache = filled(model, x)
    counts = cache.passes_BT[0]
    owned = torch.arange(6).repeat_interleave(counts).tolist()
    assert cache.depths[0].token_BC.tolist() == [owned] and positions == owned and len(set(counts.tolist())) > 1
    assert (cache.get_seq_length(), cache.slots.get_seq_length()) == (6, len(owned))


def test_padding_is_not_run_and_leaves_nothing():
    model, x = build("PonderLM3(thoughts=2, threshold=0.1)"), ids(2, 8)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    cache = model.new_cache()
    out = model(x, attention_mask=mask, past_key_values=cache)
    assert 0 not in cache.depths[0].token_BC[0].tolist() and out.passes[0, :5].tolist() == [1] * 5
    assert int((cache.depths[0].token_BC[0] >= 0).sum()) == int(out.passes[0, 5:].sum())
    assert model(x, attention_mask=torch.zeros_like(x)).logits.isfinite().all()


def test_windows_are_over_tokens_and_need_not_grow():
    """What they let through is written out in the test of ragged slots."""
    model = build("PonderLM3(thoughts=2)", "mistral")
    assert model.backbone.config.sliding_window == 6 == model.config.backbone.sliding_window


@pytest.mark.parametrize("number", [0, 2])
def test_extreme_routers_train_in_bf16(number: int):
    model = all_mass_on(build("PonderLM3(thoughts=2)"), number).to(torch.bfloat16).train()
    with torch.enable_grad():
        model(ids(2, 8), labels=ids(2, 8)).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_is_recorded():
    model, x = build("PonderLM3(thoughts=2, threshold=0.1, eval_rounds=16)"), ids(2, 8)
    model.think.record = True
    out = model(x)
    states, residuals = out.trace["states"], out.trace["residuals"]
    assert [state.shape for state in states] == [(2, 8, 64)] * 3
    assert len(residuals) == 16 and residuals[-1] < 1e-5 < residuals[0]
    short = out.passes < 3
    assert torch.equal(states[2][short], states[1][short])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("thoughts=-1", "thoughts=-1"),
        ("threshold=0", "threshold=0"),
        ("threshold=1.5", "threshold=1.5"),
        ("train_rounds=(3, 2)", "train_rounds"),
        ("eval_rounds='often'", "eval_rounds='often'"),
        ("penalty=-1", "penalty=-1"),
        ("warmup=-5", "warmup=-5"),
        ("halting='ruoter'", "did you mean 'router'"),
        ("halting='oracle'", "unknown halting 'oracle'"),
        ("continue_prob=2.0", "continue_prob=2.0"),
        ("refresh='never'", "unknown refresh 'never'"),
    ],
)
def test_bad_arguments_say_what_to_type(arguments: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        build(f"PonderLM3({arguments})")

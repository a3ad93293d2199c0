"""Adaptive latent CoT's own invariants: two causal axes, and training that is decoding."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cache.depth_cache import DepthWrite
from pondera.methods.think.adaptive_latent_cot import AdaptiveLatentCoT
from pondera.models.backbone import Backbone


@copies
def build(steps: int, backbone: str = "llama", arguments: str = "", **config) -> AdaptiveLM:
    torch.manual_seed(0)
    if "halting" not in arguments:
        arguments += ", halting='fixed'"
    think = f"AdaptiveLatentCoT(steps={steps}{arguments})"
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]), think=think, init="scaled", **config)).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def states_of_each_step(model: AdaptiveLM, x: torch.Tensor, bump: tuple[int, int] | None = None) -> list[torch.Tensor]:
    """States of every step; `bump` = (step, token) perturbs that slot's input."""
    states: list[torch.Tensor] = []
    original = Backbone.step

    def spy(self, h, cache=None, mask=None, position_ids=None):
        if bump is not None and len(states) == bump[0]:
            h = h.clone()
            h[:, bump[1]] += 1.0
        out = original(self, h, cache, mask, position_ids)
        states.append(out)
        return out

    model.backbone.step = spy.__get__(model.backbone)
    model(x)
    del model.backbone.step
    return states


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_stage_parallel_training_is_token_by_token_decoding(backbone: str):
    """The strongest property: padded, batched, in fp32 to 1e-5."""
    model = build(2, backbone)
    x, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :7] = 0
    together = model.train()(x, attention_mask=mask).logits
    model.eval()
    cache, pieces = model.new_cache(), []
    for t in range(9):
        pieces.append(model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    alone = torch.cat(pieces, dim=1)
    real = mask.bool()
    torch.testing.assert_close(together[real], alone[real], atol=1e-5, rtol=1e-5)


def test_parallel_equals_the_slow_definition():
    """The oracle: one row at a time over an explicit list of slots, with the mask written out."""
    model, x = build(2), ids(1, 5)
    backbone, feedback = model.backbone, model.think.feedback
    embedded = backbone.embed(x)
    inputs, where, outputs = [], [], {}
    for t in range(5):
        for k in range(3):
            z = embedded[:, t : t + 1] if k == 0 else feedback(backbone, outputs[t, k - 1])
            inputs.append(z)
            where.append((t, k))
            rows = torch.cat(inputs, dim=1)
            seen = torch.tensor([[a <= t0 and b <= k0 for a, b in where] for t0, k0 in where])
            outputs[t, k] = backbone.decoder(
                inputs_embeds=rows,
                attention_mask=seen[None, None],
                position_ids=torch.tensor([[a for a, _ in where]]),
                use_cache=False,
            ).last_hidden_state[:, -1:]
    slow = backbone.head(torch.cat([outputs[t, 2] for t in range(5)], dim=1))
    torch.testing.assert_close(model(x).logits, slow, atol=1e-5, rtol=1e-5)


def test_first_step_does_not_depend_on_how_many_follow():
    x = ids(2, 8)
    first = [states_of_each_step(build(steps), x)[0] for steps in (0, 1, 3)]
    torch.testing.assert_close(first[0], first[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(first[0], first[2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_both_axes_are_causal(step: int):
    model, x = build(2), ids(1, 7)
    before, after = states_of_each_step(model, x), states_of_each_step(model, x, bump=(step, 4))
    for k in range(3):
        torch.testing.assert_close(before[k][:, :4], after[k][:, :4], atol=0, rtol=0)
        if k < step:
            torch.testing.assert_close(before[k], after[k], atol=0, rtol=0)
        else:
            assert not torch.allclose(before[k][:, 4:], after[k][:, 4:], atol=1e-4)


def test_it_is_not_ponderlm2():
    cot, x = build(1), ids(1, 6)
    config = AdaptiveConfig(backbone=dict(BACKBONES["llama"]), think="PonderLM2(eval_rounds='exact')", init="scaled")
    ponder = AdaptiveLM(config).eval()
    ponder.load_state_dict(cot.state_dict())
    assert (ponder(x).logits - cot(x).logits).abs().max() > 1e-3


def test_one_sub_cache_per_step():
    model, x = build(2), ids(1, 6)
    cache = model.new_cache()
    model(x, past_key_values=cache)
    assert [[part[0].shape[-2] for part in layer.parts] for layer in cache.layers] == [[6, 6, 6]] * 3


def test_a_budget_cuts_later_steps():
    model, x = build(2), ids(1, 6)
    states = states_of_each_step(model, x)
    out = model(x, max_passes=2)
    torch.testing.assert_close(out.logits, model.backbone.head(states[1]), atol=1e-6, rtol=1e-6)
    assert out.passes.unique().tolist() == [2]


def test_an_exception_half_way_leaves_the_cache_writing_to_step_zero():
    cache = build(1).new_cache()
    with pytest.raises(RuntimeError), cache.writing(DepthWrite(1, range(2))):
        raise RuntimeError
    assert [layer.write.depth for layer in cache.layers] == [0, 0, 0]


def routed(steps: int = 3, backbone: str = "llama", bias: float | None = None, arguments: str = "") -> AdaptiveLM:
    """A router that tells tokens apart, or with a bias says the same for all."""
    model = build(steps, backbone, ", halting='router'" + arguments)
    with torch.no_grad():
        model.think.router.weight.normal_(std=0.3 if bias is None else 0.0)
        model.think.router.bias.fill_(bias or 0.0)
    return model


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2"])
def test_a_router_that_says_stop_is_the_backbone_bit_for_bit(backbone: str):
    stopped, plain, x = routed(3, backbone, bias=-200.0), build(0, backbone), ids(2, 8)
    plain.backbone.load_state_dict(stopped.backbone.state_dict())
    assert torch.equal(stopped(x).logits, plain(x).logits) and stopped(x).passes.unique().tolist() == [1]


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2"])
def test_a_router_that_says_go_is_the_fixed_depth(backbone: str):
    going, fixed, x = routed(3, backbone, bias=200.0), build(3, backbone), ids(2, 8)
    fixed.backbone.load_state_dict(going.backbone.state_dict())
    torch.testing.assert_close(going(x).logits, fixed(x).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.9])
def test_exit_masses_sum_to_one_whatever_is_pruned(threshold: float, monkeypatch):
    from pondera.methods.think.common import halting_think

    seen = []
    original = halting_think.mixture
    monkeypatch.setattr(
        halting_think, "mixture", lambda states, weights: seen.append(weights) or original(states, weights)
    )
    passes = routed(arguments=f", threshold={threshold}")(ids(4, 16)).passes
    total = torch.stack(seen[0])
    torch.testing.assert_close(total.sum(0), torch.ones(4, 16), atol=1e-6, rtol=0)
    depth = torch.arange(1, len(total) + 1)[:, None, None]
    assert (total >= 0).all() and (total[depth > passes] == 0).all() and len(passes.unique()) > 1


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt_neox"])
def test_pruned_training_is_token_by_token_decoding(backbone: str):
    model = routed(2, backbone)
    x, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :7] = 0
    together = model.train()(x, attention_mask=mask)
    model.eval()
    cache, pieces = model.new_cache(), []
    for t in range(9):
        pieces.append(model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    real = mask.bool()
    assert len(together.passes[real].unique()) > 1
    assert torch.equal(together.passes[real], cache.passes_BT[real])
    torch.testing.assert_close(together.logits[real], torch.cat(pieces, dim=1)[real], atol=1e-5, rtol=1e-5)


def test_pruned_slots_are_nowhere():
    model, x = routed(2), ids(2, 12)
    cache = model.new_cache()
    passes = model(x, past_key_values=cache).passes
    for step, depth in enumerate(cache.depths):
        assert (depth.token_BC >= 0).sum(-1).tolist() == (passes > step).sum(-1).tolist()
        assert all(layer.parts[step][0].shape[-2] == int((passes > step).sum(-1).max()) for layer in cache.layers)


class TestPenalty:
    """What going on costs: only as much as the model is right, and nothing where no one knows."""

    def term(self, model: AdaptiveLM, x: torch.Tensor, labels: torch.Tensor):
        with torch.enable_grad():
            return model.train()(x, shift_labels=labels).terms["thinking"]

    def test_by_hand(self):
        model, x = routed(2, arguments=", beta=2.0, penalty=0.3"), ids(2, 6)
        reach, offered = torch.ones(2, 6), []
        model.think.record = True
        out = model.train()(x, shift_labels=x)
        for state in out.trace["states"][:2]:
            offered.append(reach * model.think.router(state)[..., 0].sigmoid())
            reach = torch.where(offered[-1] >= model.think.threshold, offered[-1], 0.0)
        true = out.logits.softmax(-1).gather(-1, x[..., None])[..., 0]
        expected = (true**2 * torch.stack(offered).sum(0)).sum()
        term = out.terms["thinking"]
        torch.testing.assert_close(term.sum, expected, atol=1e-5, rtol=1e-5)
        assert term.weight == 0.3 and int(term.count) == 12

    def test_its_gradient_leaves_the_head_alone(self):
        model, x = routed(), ids(2, 6)
        self.term(model, x, x).sum.backward()
        assert model.think.router.weight.grad.abs().sum() > 0
        assert model.get_output_embeddings().weight.grad is None

    def test_ignored_labels_pay_nothing(self):
        model, x = routed(), ids(2, 6)
        some, none = x.clone(), torch.full_like(x, -100)
        some[1] = -100
        one = self.term(model, x, some)
        assert int(one.count) == 6 and float(self.term(model, x, none).sum) == 0
        torch.testing.assert_close(one.sum, self.term(model, x[:1], x[:1]).sum, atol=1e-5, rtol=1e-5)

    def test_training_on_it_alone_ends_thinking(self):
        model, x = routed(3, bias=1.0, arguments=", beta=0.0, threshold=0.1"), ids(4, 16)
        assert model(x).passes.unique().tolist() == [4]
        optimizer = torch.optim.SGD(model.think.parameters(), lr=0.2 / x.numel())
        for _ in range(40):
            optimizer.zero_grad()
            self.term(model, x, x).sum.backward()
            optimizer.step()
        assert model.eval()(x).passes.double().mean() < 1.5


class TestExploration:
    """Why a router does not collapse: the penalty starts late, and a halted token sees in training what a step gains."""

    def test_the_penalty_grows_on_its_ramp(self):
        model, x = routed(2, arguments=", penalty=0.4, ramp=(0.25, 0.75)"), ids(2, 6)
        model.train()
        weights = []
        for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
            model.begin_step(3, 0, progress)
            weights.append(model(x, labels=x).terms["thinking"].weight)
        assert weights == pytest.approx([0.0, 0.0, 0.2, 0.4, 0.4])

    def test_halted_tokens_explore_less_and_less(self):
        model, x = routed(1, bias=-20.0, arguments=", explore=0.4"), ids(8, 60)
        assert set(model(x).passes.flatten().tolist()) == {1}
        model.train()
        shares = []
        for progress in (0.0, 0.5, 1.0):
            model.begin_step(3, 0, progress)
            shares.append(float((model(x).passes == 2).double().mean()))
        assert shares == pytest.approx([0.4, 0.2, 0.0], abs=0.05)

    def test_a_router_that_halts_every_token_still_learns_from_the_prediction(self):
        """Without exploration, no gradient of the next-token loss reaches it: the collapse would be final."""
        gradients = []
        for explore in (0.0, 0.3):
            model, x = routed(1, bias=-6.0, arguments=f", explore={explore}, penalty=0.0"), ids(8, 20)
            model.train()
            model.begin_step(3, 0, 0.5)
            with torch.enable_grad():
                model(x, labels=x).terms["next_token"].sum.backward()
            gradient = model.think.router.weight.grad
            gradients.append(0.0 if gradient is None else float(gradient.abs().sum()))
        assert gradients[0] == 0 and gradients[1] > 0

    @pytest.mark.parametrize("ramp", [(0.5, 0.2), (0.5,), (-0.1, 0.5), (0.5, 2)])
    def test_impossible_ramps(self, ramp: tuple[float, ...]):
        with pytest.raises(UserError, match="two shares of the training"):
            AdaptiveLatentCoT(halting="router", ramp=ramp)


class TestControls:
    """Random and oracle halting."""

    def test_the_oracle_sends_on_exactly_what_is_wrong(self):
        model, x = build(1, arguments=", halting='oracle'"), ids(3, 20)
        first = build(0)
        first.backbone.load_state_dict(model.backbone.state_dict())
        labels = x.roll(-1, 1)
        labels[0, :10] = first(x).logits.argmax(-1)[0, :10]  # half a row that it gets right
        labels[1, :5] = -100
        out = model(x, shift_labels=labels)
        wrong = (first(x).logits.argmax(-1) != labels) | (labels < 0)
        assert torch.equal(out.passes == 2, wrong) and wrong.float().mean() < 1

    def test_random_draws_follow_position_token_and_step(self):
        model = build(2, arguments=", halting='random', continue_prob=0.4")
        x = ids(4, 100, seed=1)
        a, alone = model(x).passes, model(x[2:3]).passes
        assert torch.equal(a[2], alone[0])  # other rows change nothing
        equal_NT = x[:1] == x[1:]
        assert torch.equal(a[:1].expand(3, -1)[equal_NT], a[1:][equal_NT])
        differ = (a[:1] != a[1:])[~equal_NT].double().mean()
        assert 0.3 < differ < 0.8  # rows do not share one pattern
        model.begin_step(0, 0)
        c = model(ids(1, 100)).passes
        model.begin_step(1, 0)
        assert not torch.equal(c, model(ids(1, 100)).passes)

    def test_evaluation_forgets_what_training_drew(self):
        model, x = build(2, arguments=", halting='random', continue_prob=0.4"), ids(1, 100)
        fresh = model(x).passes
        model.train()
        model.begin_step(7, 0)
        assert not torch.equal(model(x).passes, fresh)
        assert torch.equal(model.eval()(x).passes, fresh)

    def test_random_keeps_the_share_that_was_asked_for(self):
        from pondera.core.stateless_random import stateless_uniform

        drawn = torch.stack([stateless_uniform(torch.arange(4000), depth, draw) for depth in (1, 2) for draw in (0, 7)])
        assert all(abs(float((row < keep).double().mean()) - keep) < 0.03 for row in drawn for keep in (0.1, 0.5, 0.9))
        assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2"])
def test_pruned_bf16_runs_every_row(backbone: str):
    model, x = routed(2, backbone).to(torch.bfloat16), ids(2, 10)
    out = model(x)
    assert torch.isfinite(out.logits).all() and len(out.passes.unique()) > 1


@pytest.mark.parametrize(
    ("steps", "arguments", "complaint"),
    [
        (-1, "", "steps=-1"),
        (1, ", halting='ruoter'", "did you mean 'router'"),
        (1, ", threshold=1.5", "threshold=1.5"),
        (1, ", penalty=-1", "penalty=-1"),
        (1, ", halting='random', continue_prob=2", "continue_prob=2"),
    ],
)
def test_bad_arguments(steps: int, arguments: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        build(steps, arguments=arguments)

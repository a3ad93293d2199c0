"""AdaPonderLM's own invariants, held against the paper's dense equations written out, and what halting must not do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, VOCAB, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.methods.think.common.passes import Passes

FAMILIES = ["llama", "gemma3", "gpt_neox", "gpt2"]  # the first two with grouped keys and values
SPLIT = ["llama", "gemma3", "qwen3"]  # keys and values have projections of their own, which the oracle takes hold of
GATED = "AdaPonderLM(steps=3, top_k=10, threshold=0.3)"
DENSE = "AdaPonderLM(steps=3, top_k=10, threshold=0.3, halted='dense')"


@copies
def build(think: str, backbone: str = "llama", **config) -> AdaptiveLM:
    """A model whose gates tell tokens apart."""
    torch.manual_seed(0)
    config = {"init": "scaled"} | config
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), think=think, **config)).eval()
    with torch.no_grad():
        for parameter in model.think.parameters():
            parameter.normal_(std=0.3)
    return model


def forced(logit: float, think: str = GATED, backbone: str = "llama") -> AdaptiveLM:
    """A model whose gates say the same for every token."""
    model = build(think, backbone)
    with torch.no_grad():
        for gate in model.think.gates:
            gate[-1].weight.zero_()
            gate[-1].bias.fill_(logit)
    return model


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def recorded(model: AdaptiveLM, x: torch.Tensor, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States after each pass, and the passes that each token took."""
    model.think.record = True
    out = model(x, **options)
    return out.trace["states"], out.passes


def gates_of(model: AdaptiveLM, alone: bool = False) -> list[torch.Tensor]:
    """What the gates of each depth say in the passes to come, of all tokens (so not packed); `alone`: without gradient
    through the states that they read, which earlier gates have made."""
    said: list[torch.Tensor] = []
    original, model.think.packed = model.think._gate, False

    def spy(depth: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def gate(state):
            out = original(depth)(state.detach() if alone else state)
            if out.requires_grad:
                out.retain_grad()
            said.append(out)
            return out

        return gate

    model.think._gate = spy
    return said


def by_the_paper(model: AdaptiveLM, x: torch.Tensor, freeze: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's dense equations: every token runs every pass, and m^i says whose new keys and values are taken."""
    lm, think = model.backbone.lm, model.think
    table = model.backbone.embed(torch.arange(VOCAB))
    projections = [m for name, m in lm.named_modules() if name.endswith(("k_proj", "v_proj"))]
    below: dict[torch.nn.Module, torch.Tensor] = {}
    current, mask_BT = table[x], torch.ones(x.shape, dtype=torch.bool)
    state, passes = torch.zeros_like(current), torch.zeros_like(x)

    def reuse(module, _, out):
        below[module] = torch.where(mask_BT[..., None], out, below[module]) if module in below else out
        return below[module]

    hooks = [module.register_forward_hook(reuse) for module in projections]
    for depth in range(think.steps + 1):
        new = lm.get_decoder()(inputs_embeds=current, use_cache=False).last_hidden_state
        state = torch.where(mask_BT[..., None], new, state) if freeze else new
        passes += mask_BT
        if depth < think.steps:
            gate_BT1 = think.gates[depth](state).sigmoid()
            mask_BT = mask_BT & (gate_BT1[..., 0] >= think.threshold)
            top = lm.get_output_embeddings()(state).topk(10)
            mixture = (top.values.softmax(-1)[..., None] * table[top.indices]).sum(-2)
            current = current + mask_BT[..., None] * gate_BT1 * mixture
    for hook in hooks:
        hook.remove()
    return lm.get_output_embeddings()(state), passes


@pytest.mark.parametrize("backbone", SPLIT)
def test_it_is_the_papers_equations_with_states_frozen(backbone: str):
    model, x = build(GATED, backbone), ids(3, 12)
    expected, passes = by_the_paper(model, x, freeze=True)
    out = model(x)
    agree(out.logits, expected)
    assert torch.equal(out.passes, passes) and set(passes.unique().tolist()) >= {1, 2, 4}


@pytest.mark.parametrize("backbone", SPLIT)
def test_the_dense_form_is_the_papers_equations(backbone: str):
    model, x = build(DENSE, backbone), ids(3, 12)
    expected, _ = by_the_paper(model, x, freeze=False)
    out = model(x)
    agree(out.logits, expected)
    assert out.passes.unique().tolist() == [4] and not model.think.adaptive, "every token costs every pass"


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("halted", ["freeze", "dense"])
def test_open_gates_are_ponderlm_bit_for_bit(backbone: str, halted: str):
    model = forced(50.0, f"AdaPonderLM(steps=3, top_k=10, halted='{halted}')", backbone)
    ponder = build("PonderLM(steps=3, top_k=10)", backbone)
    fixed, x = build("AdaPonderLM(top_k=10, halting='fixed')", backbone), ids(2, 9)
    expected = ponder(x).logits
    assert torch.equal(model(x).logits, expected) and torch.equal(fixed(x).logits, expected)
    caches = [model.new_cache(), ponder.new_cache()]
    for piece in x.split([5, 1, 1, 2], dim=1):
        assert torch.equal(
            model(piece, past_key_values=caches[0]).logits, ponder(piece, past_key_values=caches[1]).logits
        )


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("halted", ["freeze", "dense"])
def test_closed_gates_are_the_backbone(backbone: str, halted: str):
    model = forced(-20.0, f"AdaPonderLM(steps=2, top_k=10, halted='{halted}')", backbone)
    x, cache, inputs = ids(2, 9), model.new_cache(), []
    plain = model.backbone.head(model.backbone.step(model.backbone.embed(x)))
    original = model.backbone.step
    model.backbone.step = lambda h, *others: inputs.append(h) or original(h, *others)
    out = model(x, past_key_values=cache)
    agree(out.logits, plain, 0 if halted == "freeze" else 1e-5)
    assert all(torch.equal(h, inputs[0]) for h in inputs) and len(inputs) == (1 if halted == "freeze" else 3)
    for layer in cache.layers:
        for part in layer.parts[1:]:
            assert torch.equal(part[0], layer.parts[0][0]) and torch.equal(part[1], layer.parts[0][1])


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("think", [GATED, "AdaPonderLM(halting='random', continue_prob=0.7)"])
def test_who_left_off_never_comes_back(backbone: str, think: str, monkeypatch):
    model, x, seen = build(think, backbone), ids(3, 12), []
    original = Passes.run_pass

    def spy(self, *arguments, **options):
        seen.append(torch.ones(3, 12, dtype=torch.bool) if self.active_BT is None else self.active_BT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Passes, "run_pass", spy)
    model(x)
    assert len(seen) == 3 and 0 < int(seen[-1].sum()) < int(seen[0].sum()) < 36
    assert all(bool((lower | ~upper).all()) for lower, upper in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_who_left_off_shows_its_last_keys_and_values_bit_for_bit(backbone: str, packed: bool):
    model, x = build(GATED, backbone), ids(3, 12)
    model.think.packed = packed
    cache = model.new_cache()
    model(x[:, :8], past_key_values=cache)
    for t in range(8, 12):
        model(x[:, t : t + 1], past_key_values=cache)
    for layer in cache.layers:
        for depth in range(1, 4):
            for new, below in zip(layer.parts[depth], layer.parts[depth - 1], strict=True):
                same_BT = (new == below).all(-1).all(1)
                assert torch.equal(same_BT, cache.passes_BT <= depth)


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("think", [GATED, "AdaPonderLM(halting='random', top_k=10)"])
def test_running_only_the_active_rows_is_running_all_of_them(backbone: str, think: str):
    model, x = build(think, backbone).double(), ids(3, 12)
    packed, passes = recorded(model, x)
    model.think.packed = False
    dense, same_passes = recorded(model, x)
    assert torch.equal(passes, same_passes) and len(passes.unique()) > 2
    in_float32 = backbone in ("llama", "gemma3")  # their norms are, whatever the model is in
    for fast, slow in zip(packed, dense, strict=True):
        agree(fast, slow, 2e-6 if in_float32 else 1e-12)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_texts_of_a_batch_halt_apart_and_decode_as_they_recompute(backbone: str):
    model, x = build(GATED, backbone), ids(3, 14)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    whole, cache, pieces = model(x, attention_mask=mask), model.new_cache(), []
    pieces.append(model(x[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits)
    for t in range(5, 14):
        pieces.append(model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    real = mask.bool()
    agree(torch.cat(pieces, dim=1)[real], whole.logits[real])
    assert torch.equal(cache.passes_BT[real], whole.passes[real])
    assert (cache.passes_BT[:, 5:].amax(0) > cache.passes_BT[:, 5:].amin(0)).any()


def test_decoding_in_bf16_is_recomputing_loosely():
    model, x = build(GATED).to(torch.bfloat16), ids(2, 10)
    whole, cache = model(x), model.new_cache()
    pieces = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(10)]
    assert torch.equal(cache.passes_BT, whole.passes)
    assert (torch.cat(pieces, dim=1) - whole.logits).abs().max() < 0.05 * whole.logits.abs().max()


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("think", [GATED, DENSE])
def test_reused_rows_do_not_leak_the_future(backbone: str, think: str):
    model, x = build(think, backbone), ids(2, 10)
    model.think.packed = False  # packed rows are multiplied in other company, which rounds differently
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % VOCAB
    before, after = model(x), model(changed)
    assert torch.equal(before.logits[:, :6], after.logits[:, :6])
    assert torch.equal(before.passes[:, :6], after.passes[:, :6])
    assert not torch.equal(before.logits[:, 6:], after.logits[:, 6:])


class TestGradients:
    @pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2"])
    def test_the_loss_reaches_the_gates_of_tokens_that_go_on_and_no_others(self, backbone: str):
        model, x = build(GATED, backbone).train(), ids(3, 12)
        said = gates_of(model)
        with torch.enable_grad():
            out = model(x, shift_labels=x)
            out.terms["next_token"].sum.backward()
        assert len(said) == 3
        for depth, gate in enumerate(said, start=1):
            assert gate.grad is not None and torch.equal(gate.grad[..., 0] != 0, out.passes > depth)

    @pytest.mark.parametrize("backbone", ["llama", "gemma3", "gpt2"])
    def test_the_penalty_reaches_the_lowest_gates_of_active_tokens_and_no_others(self, backbone: str):
        model, x = build(GATED, backbone).train(), ids(3, 12)
        mask = torch.ones_like(x)
        mask[0, :4] = 0
        model.begin_step(10**6, 0)
        said = gates_of(model, alone=True)
        with torch.enable_grad():
            out = model(x, attention_mask=mask, shift_labels=x)
            term = out.terms["thinking"]
            term.sum.backward()
        asked = torch.stack([mask.bool() & (out.passes >= depth) for depth in (1, 2, 3)])
        gates = torch.stack([gate[..., 0] for gate in said])
        moved = torch.stack([gate.grad[..., 0] for gate in said if gate.grad is not None])
        count = round(0.1 * int(asked.sum()))
        assert term.count == count > 2 and term.weight == 0.1
        lowest = asked & (gates <= gates[asked].sort().values[count - 1])
        assert torch.equal(moved, lowest.to(moved))
        agree(term.sum, gates[asked].sort().values[:count].sum())

    def test_ranked_by_pass_it_reaches_the_lowest_gates_of_each_pass(self):
        model, x = build(GATED.replace(")", ", rank='pass', bottom=0.25)")).train(), ids(3, 12)
        model.begin_step(10**6, 0)
        said = gates_of(model, alone=True)
        out = model(x, labels=x)
        expected, count = 0.0, 0
        for depth, gate in enumerate(said, start=1):
            gates = gate[..., 0][out.passes >= depth]
            number = round(0.25 * len(gates))
            expected, count = expected + gates.sort().values[:number].sum(), count + number
        term = out.terms["thinking"]
        assert int(term.count) == count > 4
        agree(term.sum, torch.as_tensor(expected))

    def test_before_the_ramp_there_is_no_penalty_and_then_it_grows(self):
        model, x = build("AdaPonderLM(ramp=(0.1, 0.2), bottom=0.5)").train(), ids(3, 12)
        counts = []
        for step in (0, 10, 12, 15, 20, 99):
            model.begin_step(step, 0, step / 100)
            out = model(x, shift_labels=x)
            asked = int(sum((out.passes >= depth).sum() for depth in (1, 2, 3)))
            term = out.terms["thinking"]
            assert torch.isfinite(out.loss)
            counts.append((float(term.sum) > 0) * int(term.count) / asked)
        assert counts == pytest.approx([0, 0, 0.1, 0.25, 0.5, 0.5], abs=0.01)

    def test_at_evaluation_there_is_no_penalty(self):
        model = build(GATED)
        model.begin_step(10**6, 0)
        assert set(model(ids(2, 5), labels=ids(2, 5)).terms) == {"next_token"}


def test_a_pass_that_nobody_takes_changes_nothing(monkeypatch):
    """Processes that train together make every pass, whether they have a token for it or not."""
    model, x = forced(-20.0).train(), ids(2, 7)
    model.begin_step(10**6, 0)
    expected = model(x).logits
    narrow = Passes.mask_active
    monkeypatch.setattr(Passes, "mask_active", lambda self, continue_BT: narrow(self, continue_BT) or True)
    with torch.enable_grad():
        out = model(x, shift_labels=x)
        out.loss.backward()
    agree(out.logits.detach(), expected, 0)
    gradients = [parameter.grad for parameter in model.think.gates.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


class TestTraps:
    def test_in_the_dense_form_a_halted_tokens_final_state_does_change(self):
        """So what it is trained on is not what an engine would say that stopped there; frozen, it is."""
        x = ids(3, 12)
        frozen, passes = recorded(build(GATED), x)
        dense, _ = recorded(build(DENSE), x)
        first = passes == 1
        assert first.any()
        assert torch.equal(frozen[-1][first], frozen[0][first])
        assert (dense[-1][first] - dense[0][first]).abs().max() > 0.01

    def test_fresh_keys_of_halted_tokens_would_show(self, monkeypatch):
        model, x = build(GATED), ids(3, 12)
        right = model(x).logits
        original = Passes._dense
        monkeypatch.setattr(Passes, "_dense", lambda self, depth, x_BTD, active_BT: original(self, depth, x_BTD, None))
        model.think.packed = False
        assert (model(x).logits - right).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", FAMILIES)
def test_gates_start_open_and_private(backbone: str):
    torch.manual_seed(0)
    think = "AdaPonderLM(steps=3, top_k=10)"
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), think=think)).train()
    said = gates_of(model)
    assert model(ids(2, 9), shift_labels=ids(2, 9)).passes.unique().tolist() == [4]
    assert all(torch.allclose(gate, torch.tensor(0.99)) for gate in said)
    first, second, third = model.think.gates
    assert not torch.equal(first[0].weight, second[0].weight) and not torch.equal(second[0].weight, third[0].weight)
    assert sum(p.numel() for p in model.think.parameters()) == 3 * (64 * 256 + 256 + 256 + 1)


def test_one_gate_may_be_shared_for_all_passes():
    model = build("AdaPonderLM(steps=3, top_k=10, threshold=0.3, shared_gate=True)")
    private = build(GATED)
    assert len(model.think.gates) == 1 and len(private.think.gates) == 3
    for gate in private.think.gates:
        gate.load_state_dict(model.think.gates[0].state_dict())
    assert torch.equal(model(ids(3, 12)).logits, private(ids(3, 12)).logits)


def test_the_oracle_stops_where_the_model_is_right():
    model, x = build("AdaPonderLM(steps=3, top_k=10, halting='oracle')"), ids(3, 12)
    labels = model.backbone.head(recorded(model, x, max_passes=1)[0][0]).argmax(-1)
    labels[1] = -100  # what follows is not known
    labels[2] = (labels[2] + 1) % VOCAB
    right, unknown, wrong = model(x, shift_labels=labels).passes
    assert right.unique().tolist() == [1] and unknown.unique().tolist() == [4] and (wrong > 1).all()
    assert model(x).passes.unique().tolist() == [4]


def test_random_halting_keeps_its_share_and_draws_anew_each_step():
    model, x = build("AdaPonderLM(steps=1, top_k=10, halting='random', continue_prob=0.3)"), ids(1, 100)
    drawn = []
    for step in (0, 0, 1):
        model.begin_step(step, 0)
        drawn.append(model(x).passes)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 1.15 < drawn[0].double().mean() < 1.45


def test_effort_moves_the_threshold_but_of_the_dense_form_the_depth():
    gated, dense, x = build("AdaPonderLM(steps=3, top_k=10)"), build("AdaPonderLM(steps=3, halted='dense')"), ids(3, 12)
    higher = build("AdaPonderLM(steps=3, top_k=10, threshold=0.01)")
    assert torch.equal(gated(x, effort=0.5).logits, higher(x).logits)
    assert gated(x, effort=0.5).passes.double().mean() < gated(x).passes.double().mean()
    assert dense(x, effort=0.34).passes.unique().tolist() == [2]


def test_it_goes_on_from_a_ponderlm(tmp_path):
    ponder, x = build("PonderLM(steps=3, top_k=10, start='steps')"), ids(2, 9)
    ponder.save_pretrained(tmp_path)
    torch.manual_seed(1)
    think = "AdaPonderLM(steps=3, top_k=10, start='steps')"
    model = AdaptiveLM(AdaptiveConfig(backbone=str(tmp_path), think=think)).eval()
    expected = ponder(x).logits
    assert (model(x).logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("AdaPonderLM(steps=-1)", "steps=-1"),
        ("AdaPonderLM(threshold=0)", "threshold=0"),
        ("AdaPonderLM(penalty=-1)", "penalty=-1"),
        ("AdaPonderLM(bottom=1.5)", "bottom=1.5"),
        ("AdaPonderLM(rank='token')", "unknown rank 'token'"),
        ("AdaPonderLM(ramp=(0.6, 0.2))", "ramp="),
        ("AdaPonderLM(ramp=(0.3,))", "ramp="),
        ("AdaPonderLM(halting='gates')", "did you mean 'gate'"),
        ("AdaPonderLM(halted='frozen')", "halted 'frozen'"),
        ("AdaPonderLM(start='step')", "did you mean 'steps'"),
    ],
)
def test_bad_arguments_say_what_to_type(spec: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        build(spec)

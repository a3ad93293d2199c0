"""PonderLM-2's own invariants, and the traps that a careless implementation falls into."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core.hf import Cache
from pondera.methods.think import ponder_lm2
from pondera.methods.think.common import interleave as slot_tools
from pondera.methods.think.common.interleave import interleaved_pass


@copies
def build(think: str, backbone: str = "llama", **config) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]), think=think, **config)).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def logits(model: AdaptiveLM, x: torch.Tensor, rounds: int | str, **kwargs) -> torch.Tensor:
    model.think.eval_rounds = rounds
    return model(x, **kwargs).logits


@pytest.mark.parametrize("backbone", ["llama", "gpt_neox", "qwen3", "qwen3_next"])
@pytest.mark.parametrize("thoughts", [1, 2, 3])
def test_jacobi_reaches_the_rollout_token_by_token(backbone: str, thoughts: int):
    """After the guess and R rounds the first thoughts + R latents are exact, so with R >= T*K - K all are."""
    model, x = build(f"PonderLM2(thoughts={thoughts})", backbone, init="scaled"), ids(2, 7)
    exact = logits(model, x, "exact")
    for rounds in (0, 1, 3):
        tokens = (thoughts + rounds) // thoughts  # tokens whose latents are all exact
        torch.testing.assert_close(logits(model, x, rounds)[:, :tokens], exact[:, :tokens], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, x, 7 * thoughts - thoughts), exact, atol=2e-5, rtol=1e-4)
    assert (logits(model, x, 0) - exact).abs().max() > 1e-4, "too few rounds must show, or this test shows nothing"


@pytest.mark.parametrize("backbone", ["llama", "qwen3_next"])
@pytest.mark.parametrize("pieces", [(6, 8), (1, 5, 1, 7)])
def test_a_piece_that_is_padding_in_one_row_changes_nothing(backbone: str, pieces: tuple[int, ...]):
    model, x = build("PonderLM2(thoughts=1, eval_rounds='exact')", backbone, init="scaled"), ids(3, 14)
    mask = torch.ones_like(x)
    mask[0, :8], mask[1, :3] = 0, 0
    cache, seen, found = model.new_cache(), 0, []
    for piece in x.split(pieces, 1):
        seen += piece.shape[1]
        found.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    for row, first in enumerate((8, 3, 0)):
        alone = model(x[row : row + 1, first:]).logits[0]
        torch.testing.assert_close(torch.cat(found, 1)[row, first:], alone, atol=2e-5, rtol=1e-4)


def test_residuals_shrink_to_float_noise():
    model, x = build("PonderLM2(thoughts=1, eval_rounds=12)", init="scaled"), ids(1, 12)
    model.think.record = True
    residuals = model(x).trace["residuals"]
    assert len(residuals) == 12 and residuals[-1] < 1e-5 < residuals[0]


def test_thoughts_change_the_prediction():
    model, x = build("PonderLM2(thoughts=1)"), ids(1, 6)
    plain = model.backbone.head(model.backbone.step(model.backbone.embed(x)))
    assert (model(x).logits - plain).abs().max() > 1e-3


def test_slots_of_a_token_share_its_position(monkeypatch):
    model = build("PonderLM2(thoughts=2)")
    seen = []
    original = model.backbone.step

    def spy(h, cache=None, mask=None, position_ids=None):
        seen.append(position_ids)
        return original(h, cache, mask, position_ids)

    monkeypatch.setattr(model.backbone, "step", spy)
    model(ids(1, 4))
    assert seen[-1].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    seen.clear()
    cache = model.new_cache()
    model(ids(1, 4), past_key_values=cache)
    model(ids(1, 1), past_key_values=cache)
    assert [position.tolist() for position in seen[-3:]] == [[[4]], [[4]], [[4]]]


def test_storage_order_of_cached_slots_does_not_matter():
    model, x = build("PonderLM2(thoughts=1, eval_rounds='exact')"), ids(1, 5)
    in_order, shuffled = model.new_cache(), model.new_cache()
    model(x, past_key_values=in_order)
    model(x, past_key_values=shuffled)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    for layer in shuffled.layers:
        layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
    following = ids(1, 1)
    first = model(following, past_key_values=in_order).logits
    torch.testing.assert_close(model(following, past_key_values=shuffled).logits, first, atol=1e-5, rtol=1e-5)


def test_prefill_then_decode_is_the_rollout_when_rounds_suffice():
    model, x = build("PonderLM2(thoughts=1)", init="scaled"), ids(1, 9)
    exact = logits(model, x, "exact")[:, -1]

    def continued(rounds: int) -> torch.Tensor:
        model.think.eval_rounds = rounds
        cache = model.new_cache()
        model(x[:, :8], past_key_values=cache)
        return model(x[:, 8:], past_key_values=cache).logits[:, -1]

    torch.testing.assert_close(continued(7), exact, atol=2e-5, rtol=1e-4)
    assert (continued(0) - exact).abs().max() > (continued(3) - exact).abs().max() > 0


def test_vocabulary_mixture_changes_feedback_and_scale():
    hidden, vocab = (build(f"PonderLM2(feedback='{kind}')", init="scaled") for kind in ("hidden", "vocab"))
    assert hidden.config.embed_scale == pytest.approx(math.sqrt(2.5 * 64))
    assert vocab.config.embed_scale == pytest.approx(math.sqrt(64))
    vocab.load_state_dict(hidden.state_dict(), strict=False)
    x = ids(1, 5)
    state = vocab.backbone.step(vocab.backbone.embed(x))
    mixture = vocab.backbone.head(state).softmax(-1) @ (vocab.get_input_embeddings().weight * vocab.config.embed_scale)
    torch.testing.assert_close(vocab.think.feedback(vocab.backbone, state), mixture, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.think.feedback(hidden.backbone, state), state, atol=0, rtol=0)
    assert (vocab(x).logits - hidden(x).logits).abs().max() > 1e-3


def test_scaled_init_enters_at_unit_rms_and_pretrained_scale_is_matched():
    scaled = build("PonderLM2()", init="scaled")
    x = ids(4, 32)
    embedded = scaled.backbone.embed(x)
    assert embedded.square().mean().sqrt() == pytest.approx(1.0, abs=0.05)
    assert scaled.think.feedback.scale == 1
    plain = build("PonderLM2()")
    embedded = plain.backbone.embed(x)
    fed_back = plain.think.feedback(plain.backbone, plain.backbone.step(embedded))
    ratio = fed_back.square().mean().sqrt() / embedded.square().mean().sqrt()
    assert ratio == pytest.approx(1.0, abs=0.1) and plain.think.feedback.scale < 0.1


def test_rounds_are_drawn_per_step_and_agree_between_copies():
    one, other = build("PonderLM2(train_rounds=(2, 4))").think, build("PonderLM2(train_rounds=(2, 4))").think
    drawn = []
    for step in range(40):
        torch.manual_seed(step)  # the global generator, which ranks do not share, must play no part
        one.begin_step(step, seed=7)
        torch.manual_seed(step + 1)
        other.begin_step(step, seed=7)
        assert one._rounds_now == other._rounds_now
        drawn.append(one._rounds_now)
    assert set(drawn) == {2, 3, 4}


def test_gradient_flows_through_every_pass():
    model = build("PonderLM2(thoughts=1)", init="scaled").train()
    model.begin_step(0, 0)
    passes = []
    original = model.backbone.step

    def spy(*args, **kwargs):
        out = original(*args, **kwargs)
        out.retain_grad()
        passes.append(out)
        return out

    model.backbone.step = spy
    with torch.enable_grad():
        model(ids(1, 6), labels=ids(1, 6)).loss.backward()
    assert len(passes) >= 4 and all(out.grad is not None and out.grad.abs().sum() > 0 for out in passes)


class TestTraps:
    """Each trap, sprung on purpose: the result must then be wrong, or the guard guards nothing."""

    def test_a_token_mask_must_be_expanded_per_slot(self, monkeypatch):
        model, x = build("PonderLM2(thoughts=1, eval_rounds=9)"), ids(1, 5)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 5])
        right = model(x).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], right, atol=1e-5, rtol=1e-5)

        def ones_appended(x_BT, slots):  # what appending ones to a token mask does
            if x_BT is None or slots == 1 or x_BT.dtype != mask.dtype or x_BT.max() > 1:
                return x_BT if x_BT is None else x_BT.repeat_interleave(slots, dim=1)
            return torch.cat([x_BT, torch.ones(1, x_BT.shape[1] * (slots - 1), dtype=x_BT.dtype)], dim=1)

        monkeypatch.setattr(slot_tools, "per_slot", ones_appended)
        wrong = model(padded, attention_mask=mask).logits[:, 3:]
        assert not torch.allclose(wrong, right, atol=1e-3)

    def test_repeated_positions_must_not_be_read_as_packed_documents(self):
        model, x = build("PonderLM2(thoughts=1)"), ids(1, 6)
        backbone = model.backbone
        slots = slot_tools.interleave([backbone.embed(x)] * 2)
        positions = torch.arange(6)[None].repeat_interleave(2, dim=1)
        guarded = backbone.step(slots, position_ids=positions)
        unguarded = backbone.decoder(inputs_embeds=slots, position_ids=positions, use_cache=False).last_hidden_state
        causal = backbone.decoder(
            inputs_embeds=slots, position_ids=positions, use_cache=False, attention_mask=torch.ones(1, 12)
        ).last_hidden_state
        torch.testing.assert_close(guarded, causal, atol=0, rtol=0)
        assert not torch.allclose(unguarded, causal, atol=1e-3)

    def test_length_of_the_cache_is_tokens_for_generate_and_slots_for_the_backbone(self, monkeypatch):
        model, x = build("PonderLM2(thoughts=1, eval_rounds='exact')", init="scaled"), ids(1, 4)
        cache = model.new_cache()
        model(x, past_key_values=cache)
        assert (cache.get_seq_length(), cache.slots.get_seq_length()) == (4, 8)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        right = model.generate(x, **options)
        # A cache that answers with slots makes generate slice and place tokens wrongly.
        monkeypatch.setattr(
            type(cache), "get_seq_length", lambda self, layer_idx=0: Cache.get_seq_length(self, layer_idx)
        )
        started = model.new_cache()
        model(x[:, :3], past_key_values=started)
        try:
            wrong = model.generate(x, past_key_values=started, **options)
        except (RuntimeError, IndexError, ValueError):
            return
        assert not torch.equal(wrong, right)

    def test_prefill_is_decided_by_tokens_seen_not_by_allocated_layers(self):
        model, x = build("PonderLM2(thoughts=1, eval_rounds=0)", init="scaled"), ids(1, 6)
        cache = model.new_cache()
        assert len(cache) == 3, "the cache has its layers before any token is seen"
        torch.testing.assert_close(model(x, past_key_values=cache).logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_sliding_windows_still_span_as_many_tokens():
    model = build("PonderLM2(thoughts=1)", "mistral")
    assert model.backbone.config.sliding_window == 2 * 6 and model.config.backbone.sliding_window == 6


def test_restarting_from_a_cache_continues_where_it_was():
    model, x = build("PonderLM2(thoughts=1, eval_rounds='exact')"), ids(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cache = model.new_cache()
    model(x[:, :4], past_key_values=cache)
    assert torch.equal(model.generate(x, past_key_values=cache, **options), model.generate(x, **options))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("PonderLM2(thoughts=-1)", "thoughts=-1"),
        ("PonderLM2(train_rounds=(3, 2))", "train_rounds"),
        ("PonderLM2(eval_rounds='often')", "eval_rounds='often'"),
        ("PonderLM2(feedback='hiden')", "did you mean 'hidden'"),
        ("PonderLM2(thought=1)", "did you mean 'thoughts'"),
    ],
)
def test_bad_arguments_say_what_to_type(spec: str, complaint: str):
    with pytest.raises(UserError, match=complaint.replace("(", r"\(")):
        build(spec)


def test_a_cache_keeps_the_budget_it_was_filled_with():
    model = build("PonderLM2(thoughts=1)")
    cache = model.new_cache()

    model(ids(1, 3), past_key_values=cache, max_passes=1)
    assert cache.slots.get_seq_length() == 3
    with pytest.raises(UserError, match="filled with 1 passes"):
        model(ids(1, 1), past_key_values=cache)


def test_interleaved_pass_takes_apart_what_it_put_together():
    model = build("PonderLM2(thoughts=1)")
    a, b = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    states = interleaved_pass(model.backbone, [a, b], None, torch.arange(3)[None])
    assert [state.shape for state in states] == [(2, 3, 64)] * 2
    assert ponder_lm2.PonderLM2.interleaved


# Rounds until nothing changes


@pytest.mark.parametrize("method", ["PonderLM2", "PonderLM3"])
def test_converged_rounds_give_the_exact_roll_out(method: str):
    halting = ", halting='fixed'" if method == "PonderLM3" else ""
    models = {
        rounds: build(f"{method}(thoughts=2{halting}, eval_rounds={rounds!r})", init="scaled")
        for rounds in ("converged", "exact", 3)
    }
    x = ids(3, 24)
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.backbone.lm.named_parameters():
                if "layers" in name and parameter.ndim == 2:
                    parameter.mul_(2.5)  # thoughts depend on each other over many tokens
        exact = models["exact"](x).logits
        converged, three = ((models[name](x).logits - exact).abs().max() for name in ("converged", 3))
    assert converged < 1e-3 * exact.abs().max() < three


def test_a_row_stops_refining_by_itself_and_padding_does_not_count():
    model = build("PonderLM2(thoughts=1)", init="scaled")
    x, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    with torch.no_grad():
        together = model(x, attention_mask=mask).logits
        torch.testing.assert_close(together[:1], model(x[:1]).logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(together[1:2, 7:], model(x[1:2, 7:]).logits, atol=1e-5, rtol=1e-5)


def test_fewer_rounds_are_run_where_nothing_changes():
    model, x = build("PonderLM2(thoughts=1)", init="scaled"), ids(2, 60)
    model.think.record = True
    with torch.no_grad():
        residuals = model(x).trace["residuals"]
        assert len(residuals) < 59 and residuals[-1] <= 2e-3 < residuals[0]

"""Adaptive latent CoT's own invariants: two causal axes, and training that is decoding."""

from __future__ import annotations

import pytest
import torch
from architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.model.backbone import Backbone
from pondera.model.slots import Write


def build(steps: int, backbone: str = "llama", **config) -> AdaptiveLM:
    torch.manual_seed(0)
    think = f"AdaptiveLatentCoT(steps={steps})"
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
    with pytest.raises(RuntimeError), cache.writing(Write(1, range(2))):
        raise RuntimeError
    assert [layer.write.depth for layer in cache.layers] == [0, 0, 0]


def test_bad_arguments():
    with pytest.raises(UserError, match="steps=-1"):
        build(-1)

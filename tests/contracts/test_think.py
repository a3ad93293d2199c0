"""The contract tests of the seam `think`, for every method in the index and every backbone that it supports.

Logits are equal with and without a cache, with and without padding, and in pieces. A token does not depend on later ones.
A loaded model equals the saved one, `generate` works in all its modes, and the cost model agrees with the measured cost.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, LINEAR, VOCAB, ids, left_padded
from helpers.declared import form, forms
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core import spec
from pondera.core.effort import Effort
from pondera.cost.measure import live_cache_bytes, measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule
from pondera.evaluation.cost_report import cost_report

FORMS = forms("think")
METHODS = sorted(FORMS)
OTHERS = ["mistral", "qwen3", "qwen3_mixed", "gpt_neox"]


@copies
def build(think: str | None, backbone: str = "llama", seed: int = 0, **config) -> AdaptiveLM:
    torch.manual_seed(seed)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), think=think, **config)).eval()
    with torch.no_grad():
        # Random embeddings of std 0.02 have almost no effect on logits.
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
        # An untrained router decides the same for every token; random weights make tokens differ.
        if model.think is not None:
            for parameter in model.think.parameters():
                parameter.normal_(std=0.3)
    return model


def exact(method: str, backbone: str = "llama") -> AdaptiveLM:
    return build(form(FORMS, method, "exact"), backbone)


def fits(method: str, backbone: str) -> bool:
    """Whether a method supports a backbone; it may refuse linear attention if its slots are not in causal order."""
    text = FORMS[method].get("exact")
    if backbone not in LINEAR or text is None or spec.build(text, "think").interleaved:
        return True
    try:
        build(text, backbone)
    except UserError:
        return False
    return True


ADAPTIVE = [method for method in METHODS if (text := FORMS[method].get("exact")) and spec.build(text, "think").adaptive]
MISFITS = [(method, backbone) for method in METHODS for backbone in sorted(LINEAR) if not fits(method, backbone)]
PAIRS = [(method, backbone) for method in METHODS for backbone in BACKBONES if (method, backbone) not in MISFITS]
FEW = [(method, backbone) for method in METHODS for backbone in ("llama", "gemma3", "gpt2")]
TURNS = [(method, OTHERS[turn % len(OTHERS)]) for turn, method in enumerate(METHODS)]
# Pairs for slow tests and for tests of cost. The cost schedule of a method is the same on all backbones, and other tests
# cover the cost and the packed rows of each backbone. So each method runs on the simplest backbone (llama), on the one with
# most special features (gemma3), on the one that differs most from both (gpt2), on supported linear attention, and on one
# more in turn.
SOME = [pair for pair in PAIRS if pair in FEW or pair in TURNS or pair[1] in LINEAR]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, **options) -> None:
    torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-5} | options))


def shares(passes_BT: torch.Tensor, most: int) -> list[float]:
    """The share of tokens that ran each pass."""
    return [float((passes_BT >= number).double().mean()) for number in range(1, most + 1)]


@pytest.mark.parametrize("method", METHODS)
def test_it_declares_how_it_is_tested(method: str):
    assert "exact" in FORMS[method], f'{method}: add the class attribute examples = {{"exact": "{method}(...)"}}'


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_cached_equals_uncached(method: str, backbone: str):
    model, x = exact(method, backbone), ids(2, 13)
    whole = model(x).logits
    cache = model.new_cache()
    pieces = [model(x[:, :6], past_key_values=cache).logits]
    pieces += [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(6, 13)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_padded_batch_equals_each_row_alone(method: str, backbone: str):
    model = exact(method, backbone)
    rows = [ids(1, n, seed=n)[0] for n in (9, 4, 1)]
    x, mask = left_padded(rows)
    together = model(x, attention_mask=mask).logits
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_padded_decoding_equals_each_row_alone(method: str, backbone: str):
    model = exact(method, backbone)
    rows = [ids(1, n, seed=n)[0] for n in (9, 4)]
    x, mask = left_padded(rows)
    cache = model.new_cache()
    model(x[:, :-2], attention_mask=mask[:, :-2], past_key_values=cache)
    model(x[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cache)
    last = model(x[:, -1:], attention_mask=mask, past_key_values=cache).logits
    for row, logits in zip(rows, last, strict=True):
        torch.testing.assert_close(logits[-1], model(row[None]).logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), [pair for pair in PAIRS if pair[1] not in LINEAR])
def test_chunked_prefill_equals_whole(method: str, backbone: str):
    model, x = exact(method, backbone), ids(2, 11)
    cache = model.new_cache()
    pieces = [model(chunk, past_key_values=cache).logits for chunk in x.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_the_future_does_not_leak(method: str, backbone: str):
    model, x = exact(method, backbone), ids(1, 10)
    changed = x.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    before, after = model(x).logits, model(changed).logits
    # If later tokens halt differently, packed rows run in other matrix products, which round differently.
    tolerance = 1e-5 if method in ADAPTIVE else 0
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=tolerance, rtol=tolerance)
    assert not torch.equal(before[:, 6], after[:, 6])


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_doing_nothing_is_the_backbone_bit_for_bit(method: str, backbone: str):
    plain, nothing = build(None, backbone), build(form(FORMS, method, "identity"), backbone)
    nothing.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(ids(2, 9)).logits, nothing(ids(2, 9)).logits)


@pytest.mark.parametrize(
    ("method", "backbone"), [("plain", "gemma3"), ("plain", "gpt2"), *FEW, *[(m, "mistral") for m in METHODS]]
)
def test_packed_documents_equal_each_alone(method: str, backbone: str):
    model = build(None, backbone) if method == "plain" else exact(method, backbone)
    lengths = (3, 8, 2)
    x = ids(2, sum(lengths))
    documents = torch.cat([torch.full((2, n), number) for number, n in enumerate(lengths, start=1)], dim=1)
    packed = model(x, document_ids=documents).logits
    alone = torch.cat([model(piece).logits for piece in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), FEW)
def test_saved_equals_loaded(method: str, backbone: str, tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = exact(method, backbone), ids(1, 7)
    model.save_pretrained(tmp_path)
    # A copy: memory-mapped weights have another alignment, which changes matrix products on some processors.
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(again) is AdaptiveLM and again.config.think == model.config.think
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize(("method", "backbone"), FEW)
@pytest.mark.parametrize("length", [1, 2])
def test_shortest_inputs(method: str, backbone: str, length: int):
    model, x = exact(method, backbone), ids(1, length)
    cache = model.new_cache()
    pieces = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(length)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "backbone"), FEW)
def test_bf16_runs_and_agrees_loosely(method: str, backbone: str):
    model, x = exact(method, backbone), ids(2, 8)
    fine, coarse = model(x), model.to(torch.bfloat16)(x)
    # Rounding may change whether a token halts; the logits of this token and of later ones then differ.
    alike_BT = (fine.passes == coarse.passes).cumprod(-1).bool()
    assert alike_BT.double().mean() > 0.5
    off_BTV = (fine.logits - coarse.logits.float())[alike_BT]
    assert off_BTV.abs().max() < 0.1 * fine.logits.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_eager_equals_sdpa(method: str):
    model, x = exact(method, "gemma3"), ids(2, 9)
    sdpa = model(x).logits
    model.set_attn_implementation("eager")
    model.backbone.lm.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, sdpa, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
class TestGenerate:
    """Compares the modes of `generate` with full forwards and with each other."""

    def test_greedy_is_argmax_of_full_forwards(self, method: str):
        model, x = exact(method), ids(1, 5)
        slow = x
        for _ in range(6):
            slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False, eos_token_id=None), slow)

    def test_padded_batch_generates_what_each_row_does(self, method: str):
        model = exact(method)
        rows = [ids(1, n, seed=n)[0] for n in (7, 3)]
        x, mask = left_padded(rows)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model.generate(x, attention_mask=mask, **options)
        for row, out in zip(rows, together, strict=True):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)
            assert torch.equal(out[-5:], alone[0, -5:])

    def test_beam_search_with_and_without_cache(self, method: str):
        model, x = exact(method), ids(2, 4)
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached = model.generate(x, use_cache=True, **options)
        assert torch.equal(cached, model.generate(x, use_cache=False, **options))

    def test_sampling_returns_several_sequences(self, method: str):
        model, x = exact(method), ids(1, 4)
        torch.manual_seed(0)
        options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
        first = model.generate(x, **options)
        torch.manual_seed(0)
        assert first.shape == (3, 8) and torch.equal(first, model.generate(x, **options))

    def test_streamer_sees_every_token(self, method: str):
        from transformers.generation.streamers import BaseStreamer

        class Collect(BaseStreamer):
            def __init__(self):
                self.seen: list[int] = []

            def put(self, value):
                self.seen += value.flatten().tolist()

            def end(self):
                pass

        model, x, streamer = exact(method), ids(1, 4), Collect()
        out = model.generate(x, max_new_tokens=4, do_sample=False, streamer=streamer, eos_token_id=None)
        assert streamer.seen == out[0].tolist()

    def test_prompt_lookup_rolls_the_cache_back(self, method: str):
        model = exact(method)
        x = ids(1, 4).repeat(1, 3)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **options), model.generate(x, **options))

    def test_a_foreign_cache_is_refused(self, method: str):
        from transformers import DynamicCache

        with pytest.raises(UserError, match="new_cache"):
            exact(method).generate(ids(1, 3), past_key_values=DynamicCache(), max_new_tokens=2)


class TestCost:
    """The cost model agrees with the measured cost."""

    @pytest.mark.parametrize(("method", "backbone"), SOME)
    def test_decoding(self, method: str, backbone: str):
        model, x = exact(method, backbone), ids(1, 8)
        cache, think = model.new_cache(), model.think
        assert think is not None
        model(x[:, :4], past_key_values=cache)
        spent = measured_flops(lambda: [model(x[:, t : t + 1], past_key_values=cache) for t in range(4, 8)])
        measured = shares(cache.passes_BT[:, 4:], think.slots_per_token)
        calls = [call for t in range(4, 8) for call in think.cost_schedule(1, context=t, shares=measured)]
        # For adaptive methods, the cost schedule assumes for cached tokens the mean passes of new ones: an approximation.
        tolerance = 0.03 if think.adaptive else 0.02
        expected = CostModel(model.backbone.config).forward(CostSchedule(tuple(calls), head_rows=4, tokens=4))
        assert spent == pytest.approx(expected, rel=tolerance)

    @pytest.mark.parametrize(("method", "backbone"), SOME)
    def test_training(self, method: str, backbone: str):
        model, x = exact(method, backbone).train(), ids(1, 16)
        think, cost_model = model.think, CostModel(model.backbone.config)
        assert think is not None
        model.begin_step(0, 0)
        with torch.enable_grad():
            outputs = []
            spent = measured_flops(lambda: outputs.append(model(x, shift_labels=x)) or outputs[0].loss.backward())
        calls = think.cost_schedule(16, training=True, shares=shares(outputs[0].passes, think.slots_per_token))
        assert spent == pytest.approx(
            cost_model.training(CostSchedule(tuple(calls), head_rows=16, tokens=16)), rel=0.02
        )

    @pytest.mark.parametrize(("method", "backbone"), PAIRS)
    def test_cache_bytes(self, method: str, backbone: str):
        model, x = exact(method, backbone), ids(1, 9)
        cache, think = model.new_cache(), model.think
        assert think is not None
        model(x[:, :8], past_key_values=cache)
        model(x[:, 8:], past_key_values=cache)
        newest = think.cost_schedule(1, context=8)[-1].queries if not think.adaptive else 1
        rows = round(think.slots(9, shares(cache.passes_BT, think.slots_per_token)))
        expected = CostModel(model.backbone.config).cache_bytes(
            rows, drops_window_rows=think.drops_window_rows, newest=newest
        )
        assert live_cache_bytes(cache) == expected

    @pytest.mark.parametrize("method", METHODS)
    def test_passes_that_no_token_took_cost_nothing(self, method: str):
        model, x = exact(method), ids(1, 9)
        think, cache = model.think, model.new_cache()
        assert think is not None
        model(x[:, :8], past_key_values=cache, max_passes=1)
        spent = measured_flops(lambda: model(x[:, 8:], past_key_values=cache, max_passes=1))
        shares = [1.0] + [0.0] * (think.slots_per_token - 1)
        found = cost_report(model, 16, shares=shares, budget=Effort(max_passes=1))["inference_flops_per_token"]
        # Before it runs another pass, a method may evaluate the rule that would allow it.
        assert spent == pytest.approx(found, rel=0.03)

    @pytest.mark.parametrize("method", METHODS)
    def test_passes_are_recorded_per_token(self, method: str):
        model, x = exact(method), ids(2, 5)
        cache = model.new_cache()
        model(x[:, :3], past_key_values=cache)
        model(x[:, 3:4], past_key_values=cache)
        assert cache.tokens == 4 == cache.get_seq_length() and cache.passes_BT.shape == (2, 4)
        cache.crop(-2)
        assert cache.tokens == 2 and cache.passes_BT.shape == (2, 2)


@pytest.mark.parametrize(
    ("method", "backbone"), [pair for pair in SOME if pair[0] in ADAPTIVE and pair[1] not in LINEAR]
)
class TestPacked:
    """Running only the active tokens equals running all of them with a mask."""

    def test_tokens_do_differ(self, method: str, backbone: str):
        assert len(exact(method, backbone)(ids(3, 16)).passes.unique()) > 1

    def test_forward_and_gradients(self, method: str, backbone: str):
        model, x = exact(method, backbone).train(), ids(3, 12)
        found = {}
        for packed in (True, False):
            model.think.packed = packed
            model.zero_grad()
            with torch.enable_grad():
                out = model(x, shift_labels=x)
                out.loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found[packed] = (out.logits.detach(), out.passes, gradients)
        agree(found[True][0], found[False][0])
        assert torch.equal(found[True][1], found[False][1])
        for name_, gradient in found[True][2].items():
            agree(gradient, found[False][2][name_], atol=1e-5, rtol=1e-3, msg=name_)

    def test_padded_batch_decoding(self, method: str, backbone: str):
        model = exact(method, backbone)
        x, mask = left_padded([ids(1, n, seed=n)[0] for n in (9, 4, 7)])
        found = {}
        for packed in (True, False):
            model.think.packed = packed
            cache = model.new_cache()
            pieces = [model(x[:, :4], attention_mask=mask[:, :4], past_key_values=cache).logits]
            pieces += [
                model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
                for t in range(4, 9)
            ]
            found[packed] = torch.cat(pieces, dim=1)[mask.bool()]
        agree(found[True], found[False])

    def test_cropping_takes_back_what_a_longer_text_added(self, method: str, backbone: str):
        model, x = exact(method, backbone), ids(2, 10)
        cache = model.new_cache()
        model(x[:, :9], past_key_values=cache)
        cache.crop(-4)
        agree(model(x[:, 5:], past_key_values=cache).logits, model(x).logits[:, 5:])


@pytest.mark.parametrize("method", METHODS)
class TestBudget:
    """The effort and pass limits of every method."""

    def test_no_effort_is_one_pass(self, method: str):
        model, x = exact(method), ids(2, 8)
        out = model(x, effort=0.0)
        assert out.passes.unique().tolist() == [1]
        agree(out.logits, model(x, max_passes=1).logits)

    def test_passes_grow_with_effort_and_keep_to_the_limit(self, method: str):
        model, x = exact(method), ids(2, 16)
        means = [model(x, effort=effort).passes.double().mean().item() for effort in (0, 0.25, 0.5, 0.75, 1)]
        assert means == sorted(means) and means[0] < means[-1]
        assert int(model(x, max_passes=2).passes.max()) == 2

    @pytest.mark.parametrize("budget", [{"effort": "low"}, {"effort": 0.5}, {"max_passes": 2}])
    def test_decoding_under_a_budget_is_the_full_forward_under_it(self, method: str, budget: dict):
        model, x = exact(method), ids(1, 9)
        cache = model.new_cache()
        pieces = [model(x[:, :5], past_key_values=cache, **budget).logits]
        pieces += [model(x[:, t : t + 1], past_key_values=cache, **budget).logits for t in range(5, 9)]
        agree(torch.cat(pieces, 1), model(x, **budget).logits)

    def test_generate_takes_the_knob(self, method: str):
        model, x = exact(method), ids(1, 5)
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        slow = x
        for _ in range(4):
            slow = torch.cat([slow, model(slow, effort=0.5).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(x, effort=0.5, **options), slow)

    @pytest.mark.parametrize("wrong", [{"effort": "hihg"}, {"effort": 1.5}, {"max_passes": 0}])
    def test_bad_budgets_are_refused(self, method: str, wrong: dict):
        with pytest.raises(UserError, match=next(iter(wrong))):
            exact(method)(ids(1, 3), **wrong)


@pytest.mark.parametrize(("method", "backbone"), MISFITS)
def test_misfits_are_refused_by_name(method: str, backbone: str):
    with pytest.raises(UserError, match=f"{method.partition('-')[0]} does not fit {backbone}"):
        exact(method, backbone)


@pytest.mark.parametrize("method", METHODS)
def test_splitting_a_batch_changes_no_gradient(method: str):
    model, x = exact(method).train(), ids(4, 8)
    labels = x.clone()
    labels[0, :5] = -100
    model.begin_step(3, 0)

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        count = int((labels[:, 1:] != -100).sum())
        with torch.enable_grad():
            for x_part, labels_part in zip(x.chunk(parts), labels.chunk(parts), strict=True):
                (model(x_part, labels=labels_part).terms["next_token"].sum / count).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients(1), gradients(4)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4, msg=name)

"""The contract tests of a think method within a chunk method: `ConceptLM(think=...)` with every form of every think method.

The suite of the seam `chunk` runs one such form. Here all forms run that need no vocabulary; the others are refused by name.
The sequences of a batch complete their chunks in different calls, which is what a cache of a think method does not know.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.declared import forms
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.core import spec
from pondera.core.effort import Effort
from pondera.core.hf import checkpoint_activations
from pondera.cost.measure import live_cache_bytes, measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule
from pondera.evaluation.cost_report import cost_report
from pondera.methods.chunk.common.thinking_chunks import ThinkingChunks
from pondera.models.self_check import check_method

FORMS = {f"{case}-{kind}": text for case, kinds in forms("think").items() for kind, text in kinds.items()}
THINK = {case: spec.build(text, "think") for case, text in FORMS.items()}
ALLOWED = [case for case, think in THINK.items() if not think.needs_vocabulary]
EXACT = [case for case in ALLOWED if case.endswith("exact")]
IDENTITY = [case for case in ALLOWED if case.endswith("identity")]
FIXED = [case for case in EXACT if not THINK[case].adaptive]
ADAPTIVE = [case for case in EXACT if THINK[case].adaptive]
FAMILIES = ("llama", "gpt2")
EVERY = [(case, backbone) for case in EXACT for backbone in FAMILIES]
K = 3
PLAIN = f"ConceptLM(chunk={K}, codes=8, segments=4, concept_layers=2)"
WITHIN = PLAIN[:-1] + ", think={})"

NEW = ("heads", "router", "halting_unit")
"""Parameters that start at zero."""


@copies
def build(chunk: str, backbone: str = "llama", **config) -> AdaptiveLM:
    """A model with initialized codebooks and weights so large that every part changes the logits."""
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), chunk=chunk, **config))
    model(ids(2, 16), labels=ids(2, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if any(part in name for part in NEW) else parameter.mul_(1.5)
    return model.eval()


def made(case: str, backbone: str = "llama") -> AdaptiveLM:
    return build(WITHIN.format(FORMS[case]), backbone)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, **options) -> None:
    torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-5} | options))


def pieces(
    model: AdaptiveLM, x: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None, cache=None, **budget
):
    """Logits of a text in calls of these sizes, after what a cache holds."""
    cache, found = model.new_cache() if cache is None else cache, []
    for piece in x.split(sizes, dim=1):
        seen = cache.get_seq_length() + piece.shape[1]
        given = None if mask is None else mask[:, :seen]
        found.append(model(piece, attention_mask=given, past_key_values=cache, **budget).logits)
    return torch.cat(found, 1)


def ragged(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([ids(1, n, seed=n)[0] for n in lengths])


def alone(model: AdaptiveLM, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of each sequence of a padded batch, run without a cache and without the others; zeros at padding."""
    out = torch.zeros(*x.shape, model.config.backbone.vocab_size)
    for row, real in enumerate(mask.bool()):
        out[row, real] = model(x[row : row + 1, real]).logits[0]
    return out


def same_where_real(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    agree(found[mask.bool()], expected[mask.bool()])


def passes(model: AdaptiveLM, x: torch.Tensor, **budget) -> torch.Tensor:
    """The passes of each chunk."""
    model.chunk.record = True
    found = model(x, **budget).trace["concept_passes"]
    model.chunk.record = False
    return found


def test_methods_that_can_and_that_cannot_be_had():
    assert {case.partition("-")[0] for case in EXACT} >= {
        *("PonderLM2", "PonderLM3", "PauseToken", "AdaptiveLatentCoT", "UniversalTransformer")
    }
    refused = {case for case in FORMS if case not in ALLOWED}
    assert {case.partition("-")[0] for case in refused} >= {"PonderLM", "AdaPonderLM", "ThinkAtHard"}
    assert "AdaptiveLatentCoT-router-exact" in refused and len(IDENTITY) >= 5 and len(ADAPTIVE) >= 3


@pytest.mark.parametrize(
    "think",
    [
        *(FORMS[case] for case in FORMS if case not in ALLOWED),
        "PonderLM2(feedback='vocab')",
        "AdaptiveLatentCoT(halting='oracle')",
        "UniversalTransformer(halting='oracle')",
    ],
)
def test_a_method_that_needs_a_vocabulary_is_refused_by_name(think: str):
    name = think.partition("(")[0]
    with pytest.raises(
        UserError, match=rf"think: {name} (feeds back|compares|weights) .*knows no tokens; use PonderLM2"
    ):
        build(WITHIN.format(think))


def test_a_method_of_another_seam_is_refused_by_name():
    with pytest.raises(UserError, match="think: VQ is not a think method"):
        build(WITHIN.format("VQ(8)"))


def test_a_think_method_beside_a_chunk_method_is_sent_inside():
    with pytest.raises(UserError, match=r"think within the concept module: ConceptLM\(think=\.\.\.\)"):
        AdaptiveConfig(think="PonderLM2(thoughts=1)", chunk="ConceptLM()")


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("case", IDENTITY)
def test_no_further_pass_is_the_concept_module_without(case: str, backbone: str):
    model, plain, (x, mask) = made(case, backbone), build(PLAIN, backbone), ragged(13, 11, 6)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".think." not in name})
    same_where_real(model(x, attention_mask=mask).logits, plain(x, attention_mask=mask).logits, mask)
    same_where_real(pieces(model, x, [5, 1, 1, 4, 2], mask), plain(x, attention_mask=mask).logits, mask)


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_the_method_does_something_and_one_pass_is_the_concept_module_without(case: str, backbone: str):
    model, plain, x = made(case, backbone), build(PLAIN, backbone), ids(2, 14)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".think." not in name})
    without = plain(x).logits
    assert (model(x).logits - without)[:, K:].abs().amax(-1).max() > 1e-3
    agree(model(x, max_passes=1).logits, without)


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_cached_equals_uncached(case: str, backbone: str):
    model, x = made(case, backbone), ids(2, 14)
    whole = model(x).logits
    for sizes in ([1] * 14, [4, *[1] * 10], [4, 4, 4, 2], [1, 6, 7], [5, 2, 3, 4]):
        agree(pieces(model, x, sizes), whole)


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_a_ragged_batch_equals_each_sequence_alone(case: str, backbone: str):
    model, (x, mask) = made(case, backbone), ragged(14, 9, 4, 1, 12)
    expected = alone(model, x, mask)
    same_where_real(model(x, attention_mask=mask).logits, expected, mask)
    for sizes in ([1] * 14, [6, 1, 1, 1, 4, 1], [2, 7, 5]):
        same_where_real(pieces(model, x, sizes, mask), expected, mask)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_rollback_across_chunks(case: str, backbone: str, count: int):
    """In a batch whose sequences have their chunks at different tokens: a column goes in some of them."""
    model = made(case, backbone)
    for lengths in ((16, 15), (16, 14, 11)):
        x, mask = ragged(*lengths)
        expected = alone(model, x, mask)
        for sizes in ([10], [4, 6], [1] * 10):
            cache = model.new_cache()
            draft = torch.cat(
                [x[:, : 10 - count], ids(len(x), count, seed=7)], 1
            )  # rejected, and then the text goes on
            pieces(model, draft, sizes, mask, cache)
            cache.crop(-count)
            found = pieces(model, x[:, 10 - count :], [3, 1, 1, 1 + count], mask, cache)
            same_where_real(found, expected[:, 10 - count :], mask[:, 10 - count :])


def test_a_rollback_leaves_a_column_that_some_sequences_no_longer_have():
    model, (x, mask) = made("PonderLM3-exact"), ragged(10, 9)
    cache = model.new_cache()
    pieces(model, x, [10], mask, cache)
    assert cache.concepts.mask_BC.tolist() == [[1, 1, 1], [1, 1, 1]]
    cache.crop(-1)
    assert cache.concepts.mask_BC.tolist() == [[1, 1, 1], [1, 1, 0]] and cache.concepts.slots.tokens == 3
    cache.crop(-1)
    assert cache.concepts.mask_BC.tolist() == [[1, 1], [1, 1]] and cache.concepts.slots.tokens == 2
    cache.crop(-6)
    assert cache.concepts.mask_BC is None and cache.concepts.slots.tokens == 0


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_rows_are_chosen_and_repeated(case: str, backbone: str):
    model, (x, mask), more = made(case, backbone), ragged(8, 7, 3), ids(6, 6, seed=2)
    for count in (0, 2):  # also after a rollback, which leaves holes
        for change, order in [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ]:
            cache = model.new_cache()
            pieces(model, x, [4, 1, 1, 2], mask, cache)
            cache.crop(-count)
            change(cache)
            text = torch.cat([x[order, : 8 - count], more[: len(order)]], dim=1)
            real = torch.cat([mask[order, : 8 - count], torch.ones(len(order), 6, dtype=torch.long)], dim=1)
            found = pieces(model, text[:, 8 - count :], [1, 1, 3, 1], real, cache)
            agree(found, alone(model, text, real)[:, 8 - count :])


@pytest.mark.parametrize("case", EXACT)
def test_reset_forgets_everything(case: str):
    model, x = made(case), ids(2, 7)
    cache = model.new_cache()
    model(ids(3, 9, seed=2), past_key_values=cache)
    cache.reset()
    agree(model(x, past_key_values=cache).logits, model(x).logits)


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_beams_and_drafts(case: str, backbone: str):
    model, (x, mask) = made(case, backbone), ragged(7, 5)
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    beams = {"attention_mask": mask, "num_beams": 3, **options}
    assert torch.equal(model.generate(x, **beams), model.generate(x, use_cache=False, **beams))
    text = ids(1, 4).repeat(1, 3)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=3, **options), model.generate(text, **options))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_packed_documents_equal_each_alone(case: str, backbone: str, training: bool):
    model, lengths = made(case, backbone).train(training), (7, 8, 2, 4)
    model.begin_step(3, 0)
    x = ids(2, sum(lengths))
    documents = torch.cat([torch.full((2, n), number) for number, n in enumerate(lengths, start=1)], dim=1)
    packed = model(x, document_ids=documents).logits
    agree(packed, torch.cat([model(piece).logits for piece in x.split(lengths, dim=1)], dim=1))


@pytest.mark.parametrize("case", EXACT)
def test_effort_lowers_the_passes_of_chunks(case: str):
    model, x = made(case), ids(3, 45)
    assert model(x).passes.unique().tolist() == [1]  # of tokens
    mean = {effort: passes(model, x, effort=effort).double().mean().item() for effort in (0.1, 0.5, 1.0)}
    assert mean[0.1] <= mean[0.5] <= mean[1.0] and mean[0.1] < mean[1.0]
    assert passes(model, x, max_passes=1).unique().tolist() == [1]
    for budget in ({"effort": 0.5}, {"max_passes": 2}):
        agree(pieces(model, x[:, :13], [5, *[1] * 8], **budget), model(x[:, :13], **budget).logits)


@pytest.mark.parametrize("case", [case for case in EXACT if THINK[case].interleaved])
def test_another_budget_is_refused_before_the_cache_changes(case: str):
    model, x = made(case), ids(1, 9)
    cache = model.new_cache()
    model(x[:, :5], past_key_values=cache)
    with pytest.raises(UserError, match="budget: .* passes per chunk"):
        model(x[:, 5:6], past_key_values=cache, max_passes=1)
    agree(pieces(model, x[:, 5:], [1, 3], cache=cache), model(x).logits[:, 5:])


def test_passes_of_chunks_that_a_sequence_does_not_have_are_zero():
    model, (x, mask) = made("PonderLM2-exact"), ragged(10, 4)
    assert passes(model, x, attention_mask=mask).tolist() == [[3, 3, 3], [3, 0, 0]]
    assert passes(build(PLAIN), x, attention_mask=mask).tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("case", EXACT)
def test_splitting_a_batch_changes_no_gradient_and_all_parameters_get_one(case: str):
    model, (x, mask) = made(case).train().double(), ragged(20, 20, 14, 20)
    labels = torch.where(mask.bool(), x, -100)
    model.begin_step(150, 0)

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            terms = model(x, attention_mask=mask, labels=labels).terms
            counts = {name: term.count for name, term in terms.items()}
            for each in zip(x.chunk(parts), mask.chunk(parts), labels.chunk(parts), strict=True):
                terms = model(each[0], attention_mask=each[1], labels=each[2]).terms
                sum(term.weight * term.sum / counts[name] for name, term in terms.items()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients(1), gradients(4)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for name, gradient in whole.items():
        agree(split[name], gradient, atol=1e-9, rtol=1e-9, msg=name)
    thinking = {name: gradient for name, gradient in whole.items() if ".think." in name}
    assert all(gradient.abs().max() > 0 for gradient in thinking.values())
    assert bool(thinking) == any(True for _ in model.chunk.think.parameters())


@pytest.mark.parametrize(("case", "term"), [("UniversalTransformer-exact", "ponder"), ("PonderLM3-exact", "thinking")])
def test_loss_terms_of_the_think_method_count_chunks(case: str, term: str):
    model, (x, mask) = made(case).train(), ragged(13, 7)
    labels = torch.where(mask.bool(), x, -100)
    terms = model(x, attention_mask=mask, labels=labels).terms
    assert set(terms) == {"next_token", "concept", "vq_codebook", "vq_commitment", f"think_{term}"}
    assert int(terms[f"think_{term}"].count) == 13 // K + 7 // K
    assert set(model.eval()(x, attention_mask=mask, labels=labels).terms) == {"next_token", "concept"}


def test_optimizer_steps_are_announced_to_the_think_method():
    model = made("AdaptiveLatentCoT-random-exact").train()
    model.begin_step(7, 0)
    assert model.chunk.think.halting.draw == 8
    model.eval()
    assert model.chunk.think.halting.draw == 0


@pytest.mark.parametrize(("case", "backbone"), EVERY)
def test_saved_equals_loaded(case: str, backbone: str, tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = made(case, backbone), ids(1, 13)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(again) is AdaptiveLM and again.config.chunk == model.config.chunk
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("case", ADAPTIVE)
def test_running_only_the_active_chunks_equals_running_all(case: str):
    model, (x, mask) = made(case), ragged(20, 17, 9)
    assert len(passes(model, ids(4, 45)).unique()) > 1
    found = []
    for packed in (True, False):
        model.chunk.think.packed = packed
        found.append((model(x, attention_mask=mask).logits, pieces(model, x, [8, 1, 1, 7, 3], mask)))
    for fast, slow in zip(*found, strict=True):
        same_where_real(fast, slow, mask)


class TestScale:
    """A state is fed back with the RMS of the pooled vectors."""

    def test_it_is_measured_on_pooled_vectors(self):
        torch.manual_seed(0)
        text = WITHIN.format("PonderLM2(thoughts=1)")
        model = AdaptiveLM(AdaptiveConfig(backbone=BACKBONES["llama"], chunk=text)).eval()
        model.chunk.record = True
        found = []
        model.chunk.module.decoder.register_forward_hook(
            lambda module, args, kwargs, out: found.append((kwargs["inputs_embeds"], out.last_hidden_state)),
            with_kwargs=True,
        )
        model(model.backbone.random_tokens(63), max_passes=1)
        inputs, states = (each.square().mean().sqrt() for each in found[0])
        assert model.chunk.think.feedback.scale == pytest.approx(float(inputs / states), rel=0.05)
        assert not 0.5 < model.chunk.think.feedback.scale < 2

    def test_it_is_one_if_embeddings_have_unit_rms(self):
        model = build(WITHIN.format("PonderLM2(thoughts=1)"), init="scaled")
        assert model.chunk.think.feedback.scale == 1

    def test_pause_vectors_have_it(self):
        torch.manual_seed(0)
        text = WITHIN.format("PauseToken(pauses=2)")
        model = AdaptiveLM(AdaptiveConfig(backbone=BACKBONES["llama"], chunk=text))
        sample = model.chunk.module.typical_inputs(ids(1, 1))
        assert sample.shape == (4, 64 // K, 64)
        assert model.chunk.think.pause_PD.std() == pytest.approx(float(sample.square().mean().sqrt()), rel=0.2)


def test_layers_that_run_on_chunks_have_no_token_embeddings():
    with pytest.raises(UserError, match="not tokens"):
        build(PLAIN).chunk.module.embed(ids(1, 2))


def test_the_self_check_of_an_unknown_architecture_replaces_approximate_prefill(monkeypatch):
    monkeypatch.setattr("pondera.models.self_check._is_tested", lambda model: False)
    model = build(WITHIN.format("PonderLM2(thoughts=2, eval_rounds=0)").replace(f"chunk={K}", "chunk=1"))
    check_method(model)
    assert model.chunk.think.eval_rounds == 0


@pytest.mark.parametrize("think", ["UniversalTransformer(steps=1)", "PonderLM2(thoughts=1)"])
def test_gradient_checkpointing_follows_the_think_method(think: str, caplog):
    model, x = build(WITHIN.format(think)).train(), ids(2, 12)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            with caplog.at_level(logging.WARNING):
                checkpoint_activations(model)
            model.enable_input_require_grads()
        model.zero_grad()
        with torch.enable_grad():
            model(x, labels=x).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    assert ("cannot be recomputed" in caplog.text) == (not spec.build(think, "think").supports_recompute)


class TestCost:
    """The cost model agrees with the measured cost, also at a smaller budget."""

    BUDGETS = (Effort(), Effort(effort=0.5), Effort(max_passes=1))

    @pytest.mark.parametrize("budget", BUDGETS)
    @pytest.mark.parametrize(("case", "backbone"), [(case, backbone) for case in FIXED for backbone in FAMILIES])
    def test_decoding_forward_and_bytes(self, case: str, backbone: str, budget: Effort):
        model, x = made(case, backbone), ids(1, 60)
        options = {"effort": budget.effort, "max_passes": budget.max_passes}
        cache, cost_model, method = model.new_cache(), CostModel(model.backbone.config), model.chunk.at_budget(budget)

        def priced(calls: list, tokens: int) -> float:
            return cost_model.forward(CostSchedule(tuple(calls), head_rows=tokens, tokens=tokens))

        assert method is not None
        spent = measured_flops(lambda: model(x[:, :26], **options))
        assert spent == pytest.approx(priced(method.cost_schedule(26), 26), rel=0.02)
        model(x[:, :16], past_key_values=cache, **options)
        spent = measured_flops(
            lambda: [model(piece, past_key_values=cache, **options) for piece in x[:, 16:].split(1, 1)]
        )
        calls = [call for t in range(16, 60) for call in method.cost_schedule(1, context=t)]
        assert spent == pytest.approx(priced(calls, 44), rel=0.02)
        held = live_cache_bytes(cache.concepts) + cache.encoded_BWD.nbytes + cache.used_BWD.nbytes
        assert held == method.extra_cache_bytes(60, 4)
        expected = (live_cache_bytes(cache) + held) / 60
        assert cost_report(model, 60, budget=budget)["kv_bytes_per_token"] == pytest.approx(expected)

    @pytest.mark.parametrize("case", FIXED)
    def test_training(self, case: str):
        model, x = made(case).train(), ids(1, 26)
        with torch.enable_grad():
            spent = measured_flops(lambda: model(x, shift_labels=x).loss.backward())
        calls = model.chunk.cost_schedule(26, training=True)
        priced = CostModel(model.backbone.config).training(CostSchedule(tuple(calls), head_rows=26, tokens=26))
        assert spent == pytest.approx(priced, rel=0.02)

    @pytest.mark.parametrize("case", ADAPTIVE)
    def test_a_method_that_halts_costs_at_most_what_is_priced(self, case: str):
        model, x = made(case), ids(1, 60)
        cache, cost_model = model.new_cache(), CostModel(model.backbone.config)
        spent = measured_flops(lambda: model(x, past_key_values=cache))
        calls = model.chunk.cost_schedule(60)
        assert spent <= 1.02 * cost_model.forward(CostSchedule(tuple(calls), head_rows=60, tokens=60))
        rows = live_cache_bytes(cache.concepts)
        assert rows <= CostModel(model.chunk.module.config).cache_bytes(60 // K * model.chunk.think.slots_per_token)

    def test_a_further_pass_costs_a_kth_of_the_concept_module(self):
        more, plain = build(WITHIN.format("PauseToken(pauses=1)")), build(PLAIN)
        flops = [cost_report(model, 60)["inference_flops_per_token"] for model in (more, plain)]
        module = CostModel(more.chunk.module.config)
        one = module.forward(CostSchedule(tuple(more.chunk.think.cost_schedule(1, 9)), 0, 1)) / 2
        assert flops[0] - flops[1] == pytest.approx(one / K, rel=0.1)


def test_the_cache_of_chunks_is_that_of_the_think_method():
    cache = made("PonderLM2-exact").new_cache()
    assert isinstance(cache.concepts, ThinkingChunks) and cache.concepts.slots.slots_per_token == 3

"""The contract tests of the seam `chunk`, for every method in the index and every backbone that it supports.

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
from pondera.core.effort import Effort
from pondera.cost.measure import live_cache_bytes, measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule
from pondera.evaluation.cost_report import cost_report

FORMS = forms("chunk")
METHODS = sorted(FORMS)
MAPPED = [backbone for backbone in BACKBONES if backbone not in LINEAR]
# Further forms of a method do not depend on the backbone, so two backbones are sufficient for them.
PAIRS = [(method, backbone) for method in METHODS for backbone in (MAPPED if "-" not in method else ["llama", "gpt2"])]
FEW = [(method, backbone) for method, backbone in PAIRS if backbone in ("llama", "gemma3")]
# The cost schedule of a method is the same on all backbones; tests/unit/cost tests the cost of each backbone.
SOME = [(method, backbone) for method, backbone in PAIRS if backbone in ("llama", "gemma3", "gpt2", "qwen3_mixed")]


@copies
def build(segment: str | None, backbone: str = "llama", **config) -> AdaptiveLM:
    """A model with initialized codebooks and weights so large that every part changes the logits."""
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), chunk=segment, **config))
    if model.chunk is not None:
        model(ids(2, 16), labels=ids(2, 16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5)
            if "heads" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def made(method: str, backbone: str = "llama") -> AdaptiveLM:
    return build(form(FORMS, method, "exact"), backbone)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, **options) -> None:
    torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-5} | options))


def in_pieces(model: AdaptiveLM, x: torch.Tensor, sizes: list[int], **options) -> torch.Tensor:
    cache = model.new_cache()
    return torch.cat([model(piece, past_key_values=cache, **options).logits for piece in x.split(sizes, dim=1)], 1)


@pytest.mark.parametrize("method", METHODS)
def test_it_declares_how_it_is_tested(method: str):
    assert "exact" in FORMS[method], f'{method}: add the class attribute examples = {{"exact": "{method}(...)"}}'


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_the_method_does_something(method: str, backbone: str):
    model, x = made(method, backbone), ids(2, 9)
    assert (model(x).logits - model(x, effort=0).logits)[:, 4:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_cached_equals_uncached(method: str, backbone: str):
    model, x = made(method, backbone), ids(2, 13)
    whole = model(x).logits
    for prompt in range(4, 4 + model.chunk.chunk):  # every length modulo the size of a chunk
        agree(in_pieces(model, x, [prompt, *[1] * (13 - prompt)]), whole)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_padded_batch_equals_each_row_alone(method: str, backbone: str):
    model = made(method, backbone)
    rows = [ids(1, n, seed=n)[0] for n in (9, 4, 1, 8)]
    x, mask = left_padded(rows)
    together = model(x, attention_mask=mask).logits
    for row, logits in zip(rows, together, strict=True):
        agree(logits[-len(row) :], model(row[None]).logits[0])


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_padded_decoding_equals_each_row_alone(method: str, backbone: str):
    model = made(method, backbone)
    rows = [ids(1, n, seed=n)[0] for n in (13, 8, 6, 11)]
    x, mask = left_padded(rows)
    cache, pieces, seen = model.new_cache(), [], 0
    for size in (6, 1, 1, 1, 3, 1):  # sequences complete their chunks at different times
        piece, seen = x[:, seen : seen + size], seen + size
        pieces.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    for row, logits in zip(rows, torch.cat(pieces, 1), strict=True):
        agree(logits[-len(row) :], model(row[None]).logits[0])


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_prefill_in_pieces_equals_whole(method: str, backbone: str):
    model, x = made(method, backbone), ids(2, 14)
    whole = model(x).logits
    for sizes in ([4, 4, 4, 2], [1, 6, 7], [5, 2, 3, 4]):
        agree(in_pieces(model, x, sizes), whole)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_the_future_does_not_leak(method: str, backbone: str):
    model, x = made(method, backbone), ids(1, 10).repeat(10, 1)
    other = x + torch.eye(10, dtype=torch.long)  # one token of each row
    before, after = model(x).logits, model(other % VOCAB).logits
    for changed in range(10):
        assert torch.equal(before[changed, :changed], after[changed, :changed]), changed
        assert not torch.equal(before[changed, changed], after[changed, changed])


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_no_effort_is_the_backbone_bit_for_bit(method: str, backbone: str):
    model, plain, x = made(method, backbone), build(None, backbone), ids(2, 9)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("chunk.")})
    documents = torch.tensor([[1] * 4 + [2] * 5] * 2)
    assert torch.equal(plain(x).logits, model(x, effort=0).logits)
    assert torch.equal(plain(x, document_ids=documents).logits, model(x, document_ids=documents, effort=0).logits)
    agree(in_pieces(model, x, [4, 1, 1, 3], effort=0), plain(x).logits)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_keeps_the_effort_it_began_with(method: str):
    model, cache = made(method), made(method).new_cache()
    model(ids(1, 5), past_key_values=cache, effort=0)
    with pytest.raises(UserError, match="effort"):
        model(ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_packed_documents_equal_each_alone(method: str, backbone: str):
    model, lengths = made(method, backbone), (3, 8, 2, 1)
    x = ids(2, sum(lengths))
    documents = torch.cat([torch.full((2, n), number) for number, n in enumerate(lengths, start=1)], dim=1)
    packed = model(x, document_ids=documents).logits
    agree(packed, torch.cat([model(piece).logits for piece in x.split(lengths, dim=1)], dim=1))


@pytest.mark.parametrize(("method", "backbone"), FEW)
def test_saved_equals_loaded(method: str, backbone: str, tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = made(method, backbone), ids(1, 9)
    model.save_pretrained(tmp_path)
    # A copy: memory-mapped weights have another alignment, which changes matrix products on some processors.
    again = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert type(again) is AdaptiveLM and again.config.chunk == model.config.chunk
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize(("method", "backbone"), FEW)
@pytest.mark.parametrize("length", [1, 2])
def test_shortest_inputs(method: str, backbone: str, length: int):
    model, x = made(method, backbone), ids(1, length)
    agree(in_pieces(model, x, [1] * length), model(x).logits)
    assert model.train()(x, labels=x).loss.isfinite()


@pytest.mark.parametrize(("method", "backbone"), [pair for pair in FEW if "hard" not in pair[0]])
def test_bf16_runs_and_agrees_loosely(method: str, backbone: str):
    model, x = made(method, backbone), ids(2, 8)
    fine = model(x).logits
    coarse = model.to(torch.bfloat16)(x).logits.float()
    assert (fine - coarse).abs().max() < 0.1 * fine.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_eager_equals_sdpa(method: str):
    model, x = made(method, "gemma3"), ids(2, 9)
    sdpa = model(x).logits
    model.set_attn_implementation("eager")
    agree(model(x).logits, sdpa)
    agree(in_pieces(model, x, [4, 1, 1, 3]), sdpa)


@pytest.mark.parametrize("method", METHODS)
class TestGenerate:
    """Compares the modes of `generate` with full forwards and with each other."""

    OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def test_greedy_is_argmax_of_full_forwards(self, method: str):
        model, x = made(method), ids(1, 5)
        slow = x
        for _ in range(6):
            slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(x, **self.OPTIONS), slow)

    def test_padded_batch_generates_what_each_row_does(self, method: str):
        model = made(method)
        rows = [ids(1, n, seed=n)[0] for n in (7, 3, 2)]
        x, mask = left_padded(rows)
        for row, out in zip(rows, model.generate(x, attention_mask=mask, **self.OPTIONS), strict=True):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **self.OPTIONS)
            assert torch.equal(out[-6:], alone[0, -6:])

    def test_beam_search_with_and_without_cache(self, method: str):
        model, x = made(method), ids(2, 4)
        cached = model.generate(x, num_beams=3, use_cache=True, **self.OPTIONS)
        assert torch.equal(cached, model.generate(x, num_beams=3, use_cache=False, **self.OPTIONS))

    def test_sampling_returns_several_sequences(self, method: str):
        model, x = made(method), ids(1, 4)
        options = self.OPTIONS | {"do_sample": True, "num_return_sequences": 3}
        torch.manual_seed(0)
        first = model.generate(x, **options)
        torch.manual_seed(0)
        assert first.shape == (3, 10) and torch.equal(first, model.generate(x, use_cache=False, **options))

    def test_drafts_are_rolled_back(self, method: str):
        model, drafter = made(method), build("ConceptLM(chunk=3, codes=8, segments=4)", "gpt2")
        x = ids(1, 4).repeat(1, 3)
        options = self.OPTIONS | {"max_new_tokens": 9}
        plainly = model.generate(x, **options)
        assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **options), plainly)
        assert torch.equal(model.generate(x, assistant_model=drafter, **options), plainly)

    def test_a_foreign_cache_is_refused(self, method: str):
        from transformers import DynamicCache

        with pytest.raises(UserError, match="new_cache"):
            made(method).generate(ids(1, 3), past_key_values=DynamicCache(), max_new_tokens=2)


@pytest.mark.parametrize("method", METHODS)
class TestCache:
    """After each cache operation of `generate`, logits equal those of the resulting sequence without a cache."""

    @pytest.mark.parametrize("count", range(1, 9))
    def test_cropping(self, method: str, count: int):
        model, x, other = made(method), ids(2, 12), ids(2, 12, seed=2)
        text = torch.cat([x[:, : 10 - count], other], dim=1)
        whole = model(text).logits[:, 10 - count :]
        for sizes in ([10], [4, 6], [4, *[1] * 6]):
            cache = model.new_cache()
            for piece in x[:, :10].split(sizes, dim=1):
                model(piece, past_key_values=cache)
            cache.crop(-count)
            assert cache.tokens == cache.get_seq_length() == 10 - count
            pieces = [model(piece, past_key_values=cache).logits for piece in other.split([2, 1, 1, 8], dim=1)]
            agree(torch.cat(pieces, 1), whole)

    def test_cropping_a_padded_batch(self, method: str):
        model = made(method)
        x, mask = left_padded([ids(1, n, seed=n)[0] for n in (12, 10, 7)])
        whole = model(x, attention_mask=mask).logits[mask.bool()]
        cache = model.new_cache()
        first = model(x[:, :10], attention_mask=mask[:, :10], past_key_values=cache).logits[:, :7]
        cache.crop(-3)
        rest = [
            model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(7, 12)
        ]
        agree(torch.cat([first, *rest], dim=1)[mask.bool()], whole)

    def test_rows_are_chosen_and_repeated(self, method: str):
        model, x, more = made(method), ids(3, 8), ids(6, 5, seed=2)
        for change, order in [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ]:
            cache = model.new_cache()
            model(x, past_key_values=cache)
            change(cache)
            text = torch.cat([x[order], more[: len(order)]], dim=1)
            pieces = [model(piece, past_key_values=cache).logits for piece in text[:, 8:].split([1, 1, 3], dim=1)]
            agree(torch.cat(pieces, 1), model(text).logits[:, 8:])
            assert cache.passes_BT.shape == (len(order), 13)

    @pytest.mark.parametrize("row", range(3))
    def test_one_row_is_left_of_a_batch_whose_chunks_end_at_different_tokens(self, method: str, row: int):
        model = made(method)
        x, mask = left_padded([ids(1, n, seed=n)[0] for n in (12, 11, 10)])
        cache, seen = model.new_cache(), 0
        for size in (5, 1, 1):
            piece, seen = x[:, seen : seen + size], seen + size
            model(piece, attention_mask=mask[:, :seen], past_key_values=cache)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([row]))
        text, real = x[row : row + 1], mask[row].bool()
        rest = [
            model(text[:, t : t + 1], attention_mask=mask[row : row + 1, : t + 1], past_key_values=cache).logits
            for t in range(6, 12)
        ]
        agree(torch.cat(rest, 1)[0], model(text[:, real]).logits[0, -6:])

    @pytest.mark.parametrize("prompt", [1, 3])
    def test_rows_are_repeated_before_there_is_anything_to_repeat(self, method: str, prompt: int):
        model, x = made(method), ids(4, 9)
        cache = model.new_cache()
        cache.batch_repeat_interleave(2)
        model(x[::2, :prompt], past_key_values=cache)  # for some forms shorter than a chunk
        cache.batch_repeat_interleave(2)
        text = torch.cat([x[[0, 0, 2, 2], :prompt], x[:, prompt:]], dim=1)
        agree(model(text[:, prompt:], past_key_values=cache).logits, model(text).logits[:, prompt:])

    def test_reset_forgets_everything(self, method: str):
        model, x = made(method), ids(2, 7)
        cache = model.new_cache()
        model(ids(3, 9, seed=2), past_key_values=cache)
        cache.reset()
        agree(model(x, past_key_values=cache).logits, model(x).logits)


class TestCost:
    """The cost model agrees with the measured cost."""

    @pytest.mark.parametrize(("method", "backbone"), SOME)
    def test_decoding(self, method: str, backbone: str):
        model, x = made(method, backbone), ids(1, 28)
        cache, segment = model.new_cache(), model.chunk
        model(x[:, :16], past_key_values=cache)
        spent = measured_flops(lambda: [model(x[:, t : t + 1], past_key_values=cache) for t in range(16, 28)])
        calls = [call for t in range(16, 28) for call in segment.cost_schedule(1, context=t)]
        expected = CostModel(model.backbone.config).forward(CostSchedule(tuple(calls), head_rows=12, tokens=12))
        assert spent == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize(("method", "backbone"), SOME)
    def test_forward_and_training(self, method: str, backbone: str):
        model, x = made(method, backbone), ids(1, 26)
        cost_model = CostModel(model.backbone.config)
        spent = measured_flops(lambda: model(x))
        calls = model.chunk.cost_schedule(26)
        assert spent == pytest.approx(cost_model.forward(CostSchedule(tuple(calls), head_rows=26, tokens=26)), rel=0.02)
        model.train()
        with torch.enable_grad():
            spent = measured_flops(lambda: model(x, shift_labels=x).loss.backward())
        calls = model.chunk.cost_schedule(26, training=True)
        assert spent == pytest.approx(
            cost_model.training(CostSchedule(tuple(calls), head_rows=26, tokens=26)), rel=0.02
        )

    @pytest.mark.parametrize(("method", "backbone"), PAIRS)
    def test_cache_bytes(self, method: str, backbone: str):
        model, x = made(method, backbone), ids(1, 61)
        cache, cost_model = model.new_cache(), CostModel(model.backbone.config)
        for piece in x.split(20, dim=1):
            model(piece, past_key_values=cache)
        held = cache.encoded_BWD.untyped_storage().nbytes() + cache.used_BWD.untyped_storage().nbytes()
        assert live_cache_bytes(cache) == cost_model.cache_bytes(61)
        # Views, such as the newest rows of a sliding window, keep their whole storage alive until the next call.
        rows = live_cache_bytes(cache.concepts)
        assert rows + cache.encoded_BWD.nbytes + cache.used_BWD.nbytes == model.chunk.extra_cache_bytes(61, 4)
        assert held <= cache.encoded_BWD.nbytes + cache.used_BWD.nbytes + 2 * 64 * 4 * 20
        bytes_per_token = cost_report(model, 61)["kv_bytes_per_token"]
        assert bytes_per_token == pytest.approx(
            (cost_model.cache_bytes(61) + model.chunk.extra_cache_bytes(61, 4)) / 61
        )

    @pytest.mark.parametrize(("method", "backbone"), FEW)
    def test_without_effort(self, method: str, backbone: str):
        model, x = made(method, backbone), ids(1, 26)
        report = cost_report(model, 24, budget=Effort(effort=0))
        assert report == cost_report(build(None, backbone), 24)
        cache = model.new_cache()
        model(x[:, :12], past_key_values=cache, effort=0)
        spent = measured_flops(lambda: model(x[:, :1], past_key_values=cache, effort=0))
        assert spent == pytest.approx(report["inference_flops_per_token"], rel=0.02)
        for piece in (x[:, 13:23], x[:, 23:24]):
            model(piece, past_key_values=cache, effort=0)
        held = live_cache_bytes(cache) + live_cache_bytes(cache.concepts)
        assert held == pytest.approx(24 * report["kv_bytes_per_token"])


@pytest.mark.parametrize("backbone", sorted(LINEAR))
@pytest.mark.parametrize("method", METHODS)
def test_misfits_are_refused_by_name(method: str, backbone: str):
    with pytest.raises(UserError, match=f"{method.partition('-')[0]} does not fit {backbone}"):
        made(method, backbone)


def test_two_methods_at_once_are_refused_by_name():
    with pytest.raises(UserError, match=r"PonderLM2\(thoughts=1\).*ConceptLM\(\).*leave one of them out"):
        AdaptiveConfig(think="PonderLM2(thoughts=1)", chunk="ConceptLM()")


@pytest.mark.parametrize("method", METHODS)
def test_splitting_a_batch_changes_no_gradient(method: str):
    model, x = made(method).train().double(), ids(4, 8)
    labels = x.clone()
    labels[0, :5] = -100

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            counts = {name: term.count for name, term in model(x, labels=labels).terms.items()}
            for x_part, labels_part in zip(x.chunk(parts), labels.chunk(parts), strict=True):
                terms = model(x_part, labels=labels_part).terms
                sum(term.weight * term.sum / counts[name] for name, term in terms.items()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients(1), gradients(4)
    assert set(whole) == {
        name for name, _ in model.named_parameters()
    }  # otherwise processes that share a batch would wait
    for name, gradient in whole.items():
        agree(split[name], gradient, atol=1e-9, rtol=1e-9, msg=name)

"""What every memory of closed blocks promises, whatever its rows are.

Cached = uncached, padded = alone, documents = alone, in pieces = whole, no future leak, saved = loaded, generate in all its
modes, tokens taken back, cost = what runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import BACKBONES, LINEAR, VOCAB, ids, left_padded
from helpers.declared import forms

from pondera import AdaptiveConfig, AdaptiveLM, UserError
from pondera.cost.measure import live_cache_bytes, measured_flops
from pondera.cost.model import CostModel
from pondera.cost.schedule import CostSchedule
from pondera.evaluation.cost_report import cost_report

FORMS = {form: declared["exact"] for form, declared in forms("memory").items()}
FITTING = [backbone for backbone in BACKBONES if backbone not in LINEAR and backbone != "mistral"]
# A form differs from the others in ways that backbones know little of; carried rows are turned, which they do know.
MANY = {
    "ElasticMemory": FITTING,
    "ElasticMemory-mems": ("llama", "gemma3"),
    "ElasticMemory-layers": ("llama", "gpt_neox"),
    "MemorizingTransformer": ("llama", "gpt2", "gemma3"),
}
PAIRS = [(form, backbone) for form in FORMS for backbone in MANY.get(form, ("llama",))]
EVERY = [(form, "llama") for form in FORMS]


def build(memory: str | None, backbone: str = "llama") -> AdaptiveLM:
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), memory=memory)).eval()
    for parameter in model.parameters():
        parameter.mul_(1.5)
    return model


_MADE: dict[tuple[str, str], AdaptiveLM] = {}


def made(form: str, backbone: str = "llama") -> AdaptiveLM:
    """Built once, as it is mostly read; whoever changes a model builds one."""
    if (form, backbone) not in _MADE:
        _MADE[form, backbone] = build(FORMS[form], backbone)
    return _MADE[form, backbone]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def agree(a: torch.Tensor, b: torch.Tensor, **options) -> None:
    torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-5} | options))


def in_pieces(model: AdaptiveLM, x: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    cache, seen, pieces = model.new_cache(), 0, []
    for piece in x.split(sizes, dim=1):
        seen += piece.shape[1]
        own = None if mask is None else mask[:, :seen]
        pieces.append(model(piece, attention_mask=own, past_key_values=cache).logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize(("form", "backbone"), PAIRS)
def test_memory_does_something_and_needs_what_it_remembers(form: str, backbone: str):
    model, x = made(form, backbone), ids(2, 11)
    other = x.clone()
    other[:, 1] = (other[:, 1] + 1) % VOCAB
    gap = (model(x).logits - model(other).logits).abs().amax(-1)
    if form != "TransformerXL":  # in three layers the second token's rows have been read by all that are carried
        assert gap[:, 4:].min() > 1e-5
    assert gap[:, 4].min() > 1e-4
    agree(model(x).logits[:, :4], model(x[:, :4]).logits)


@pytest.mark.parametrize(("form", "backbone"), PAIRS)
def test_cached_equals_uncached(form: str, backbone: str):
    model, x = made(form, backbone), ids(2, 14)
    whole = model(x).logits
    for prompt in range(5, 9):  # every length modulo the size of a block
        agree(in_pieces(model, x, [prompt, *[1] * (14 - prompt)]), whole)
    for sizes in ([4, 4, 4, 2], [1, 6, 7], [9, 5]):
        agree(in_pieces(model, x, sizes), whole)


@pytest.mark.parametrize(("form", "backbone"), PAIRS)
def test_padded_batches_equal_each_row_alone(form: str, backbone: str):
    model = made(form, backbone)
    rows = [ids(1, n, seed=n)[0] for n in (13, 8, 1, 11, 8)]
    x, mask = left_padded(rows)
    pieces = in_pieces(model, x, [6, 1, 1, 1, 3, 1], mask)  # texts close their blocks at different times
    for row, whole, cached in zip(rows, model(x, attention_mask=mask).logits, pieces, strict=True):
        alone = model(row[None]).logits[0]
        agree(whole[-len(row) :], alone)
        agree(cached[-len(row) :], alone)


@pytest.mark.parametrize(("form", "backbone"), EVERY)
def test_padding_may_stand_anywhere(form: str, backbone: str):
    model, x = made(form, backbone), ids(2, 12)
    mask = torch.ones_like(x)
    mask[0, 9:], mask[1, 3:5] = 0, 0
    found = model(x, attention_mask=mask).logits
    agree(in_pieces(model, x, [4, 2, 1, 3, 2], mask)[mask.bool()], found[mask.bool()])
    for text in range(2):
        agree(found[text][mask[text].bool()], model(x[text][mask[text].bool()][None]).logits[0])


@pytest.mark.parametrize(("form", "backbone"), PAIRS)
def test_packed_documents_equal_each_alone(form: str, backbone: str):
    model, lengths = made(form, backbone), (3, 9, 2, 1, 4)
    x = ids(2, sum(lengths))
    documents = torch.cat([torch.full((2, n), number) for number, n in enumerate(lengths, start=1)], dim=1)
    documents[1, -4:] = 4  # of other lengths in the other row
    packed = model(x, document_ids=documents).logits
    agree(packed[0], torch.cat([model(piece).logits for piece in x[:1].split(lengths, dim=1)], dim=1)[0])
    agree(packed[1], torch.cat([model(piece).logits for piece in x[1:].split((3, 9, 2, 5), dim=1)], dim=1)[0])


@pytest.mark.parametrize(("form", "backbone"), PAIRS)
def test_the_future_does_not_leak(form: str, backbone: str):
    model, x = made(form, backbone), ids(1, 10)
    before = model(x).logits
    for changed in range(10):
        other = x.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        after = model(other).logits
        assert torch.equal(before[:, :changed], after[:, :changed]), changed
        assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("backbone", ["qwen3_mixed", "gemma3"])
def test_windows_reach_across_borders_as_they_did(backbone: str):
    """With the other layers silent, what is left is the backbone as it is; its windows are wider than a block."""
    models = [build(memory, backbone) for memory in ("ElasticMemory(block=4, samples=0)", None)]
    for model in models:
        for kind, layer in zip(model.backbone.layer_types, model.backbone.decoder.layers, strict=True):
            if kind == "full_attention":
                layer.self_attn.o_proj.weight.zero_()
    x = ids(2, 19)
    agree(models[0](x).logits, models[1](x).logits)


@pytest.mark.parametrize("form", ["ElasticMemory", "ElasticMemory-layers", "MemorizingTransformer"])
def test_eager_equals_sdpa(form: str):
    model, x = build(FORMS[form]), ids(2, 11)
    sdpa = model(x).logits
    model.set_attn_implementation("eager")
    agree(model(x).logits, sdpa)
    agree(in_pieces(model, x, [4, 1, 1, 5]), sdpa)


@pytest.mark.parametrize("form", FORMS)
def test_saved_equals_loaded(form: str, tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = made(form), ids(1, 11)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is AdaptiveLM and again.config.memory == model.config.memory
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("form", FORMS)
def test_splitting_a_batch_changes_no_gradient(form: str):
    model, x = build(FORMS[form]).train().double(), ids(4, 11)

    def gradients(parts: int) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            for part in x.chunk(parts):
                model(part, labels=part).terms["next_token"].sum.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, split = gradients(1), gradients(4)
    for name, gradient in whole.items():
        agree(split[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("form", FORMS)
class TestGenerate:
    """Hugging Face's generate, in the modes people use, against the slow definition."""

    OPTIONS = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def test_greedy_is_argmax_of_full_forwards(self, form: str):
        model, x = made(form), ids(1, 6)
        slow = x
        for _ in range(7):
            slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(x, **self.OPTIONS), slow)

    def test_padded_batch_generates_what_each_row_does(self, form: str):
        model = made(form)
        rows = [ids(1, n, seed=n)[0] for n in (7, 3, 2)]
        x, mask = left_padded(rows)
        for row, out in zip(rows, model.generate(x, attention_mask=mask, **self.OPTIONS), strict=True):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **self.OPTIONS)
            assert torch.equal(out[-7:], alone[0, -7:])

    def test_beam_search_with_and_without_cache(self, form: str):
        model, x = made(form), ids(2, 6)
        cached = model.generate(x, num_beams=3, use_cache=True, **self.OPTIONS)
        assert torch.equal(cached, model.generate(x, num_beams=3, use_cache=False, **self.OPTIONS))

    def test_drafts_are_rolled_back(self, form: str):
        model, x = made(form), ids(1, 4).repeat(1, 3)
        plainly = model.generate(x, **self.OPTIONS)
        assert torch.equal(model.generate(x, prompt_lookup_num_tokens=3, **self.OPTIONS), plainly)


@pytest.mark.parametrize("form", FORMS)
class TestCache:
    """What is done to a cache between calls leaves it as if the text had always been so."""

    @pytest.mark.parametrize("count", range(1, 7))
    def test_cropping(self, form: str, count: int):
        """Within the block (2 tokens), across its border, and to the beginning of the block before."""
        model, x, other = made(form), ids(2, 14), ids(2, 9, seed=2)
        text = torch.cat([x[:, : 14 - count], other], dim=1)
        whole = model(text).logits[:, 14 - count :]
        for sizes in ([14], [5, 9], [6, *[1] * 8]):
            cache = model.new_cache()
            for piece in x.split(sizes, dim=1):
                model(piece, past_key_values=cache)
            cache.crop(-count)
            assert cache.tokens == cache.get_seq_length() == 14 - count == cache.passes_BT.shape[1]
            pieces = [model(piece, past_key_values=cache).logits for piece in other.split([2, 1, 1, 5], dim=1)]
            agree(torch.cat(pieces, 1), whole)

    def test_cropping_further_is_refused_and_changes_nothing(self, form: str):
        model, x = made(form), ids(1, 16)
        cache = model.new_cache()
        model(x[:, :14], past_key_values=cache)
        with pytest.raises(UserError, match=r"crop: cannot roll back 7 tokens.*kept for 6.*block=4"):
            cache.crop(-7)
        agree(model(x[:, 14:], past_key_values=cache).logits, model(x).logits[:, 14:])

    @pytest.mark.parametrize("count", [1, 3, 5])
    def test_cropping_a_padded_batch(self, form: str, count: int):
        model = made(form)
        rows = [ids(1, n, seed=n)[0] for n in (16, 12, 9, 8)]
        x, mask = left_padded(rows)
        cache, first, pieces = model.new_cache(), 12, []
        for start, stop in ((0, 9), (9, first)):
            model(x[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        cache.crop(-count)
        for t in range(first - count, 16):
            step = {"attention_mask": mask[:, : t + 1], "past_key_values": cache}
            pieces.append(model(x[:, t : t + 1], **step).logits)
        agree(torch.cat(pieces, 1), model(x, attention_mask=mask).logits[:, first - count :])

    def test_rows_are_chosen_and_repeated(self, form: str):
        model, more = made(form), ids(6, 7, seed=2)
        x, mask = left_padded([ids(1, n, seed=n)[0] for n in (9, 6, 9)])
        for change, order in [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ]:
            cache = model.new_cache()
            model(x, attention_mask=mask, past_key_values=cache)
            change(cache)
            text = torch.cat([x[order], more[: len(order)]], dim=1)
            whole = torch.cat([mask[order], torch.ones_like(more[: len(order)])], dim=1)
            pieces = [
                model(text[:, a:b], attention_mask=whole[:, :b], past_key_values=cache).logits
                for a, b in ((9, 10), (10, 11), (11, 16))
            ]
            agree(torch.cat(pieces, 1), model(text, attention_mask=whole).logits[:, 9:])

    def test_reset_forgets_everything(self, form: str):
        model, x = made(form), ids(2, 7)
        cache = model.new_cache()
        model(ids(3, 9, seed=2), past_key_values=cache)
        cache.reset()
        agree(model(x, past_key_values=cache).logits, model(x).logits)

    def test_it_does_not_grow_with_the_text(self, form: str):
        model, x, sizes = made(form), ids(1, 4), []
        cache = model.new_cache()
        for _ in range(12):
            model(x, past_key_values=cache)
            sizes.append(live_cache_bytes(cache))
        assert cache.tokens == 48 and len(set(sizes[4:])) == 1
        assert cache.passes_BT.shape == (1, 48) and cache.passes_BT.untyped_storage().nbytes() == 8


class TestPrice:
    """What a method says that it runs is what it runs."""

    @pytest.mark.parametrize(("form", "backbone"), PAIRS)
    def test_decoding(self, form: str, backbone: str):
        model, x = made(form, backbone), ids(1, 28)
        cache = model.new_cache()
        model(x[:, :16], past_key_values=cache)
        spent = sum(measured_flops(lambda t=t: model(x[:, t : t + 1], past_key_values=cache)) for t in range(16, 28))
        calls = [call for t in range(16, 28) for call in model.memory.cost_schedule(1, context=t)]
        expected = CostModel(model.backbone.config).forward(CostSchedule(tuple(calls), head_rows=12, tokens=12))
        assert spent == pytest.approx(expected, rel=1e-3)

    @pytest.mark.parametrize(("form", "backbone"), PAIRS)
    def test_forward_and_training(self, form: str, backbone: str):
        model, x = build(FORMS[form], backbone), ids(1, 26)
        prices = CostModel(model.backbone.config)
        spent = measured_flops(lambda: model(x))
        calls = model.memory.cost_schedule(26)
        assert spent == pytest.approx(prices.forward(CostSchedule(tuple(calls), head_rows=26, tokens=26)), rel=1e-3)
        model.train()
        with torch.enable_grad():
            spent = measured_flops(lambda: model(x, shift_labels=x).loss.backward())
        calls = model.memory.cost_schedule(26, training=True)
        assert spent == pytest.approx(prices.training(CostSchedule(tuple(calls), head_rows=26, tokens=26)), rel=0.01)

    @pytest.mark.parametrize(("form", "backbone"), PAIRS)
    @pytest.mark.parametrize("tokens", [3, 4, 7, 12, 27])
    def test_cache_bytes(self, form: str, backbone: str, tokens: int):
        model, x = made(form, backbone), ids(1, tokens)
        cache, prices, memory = model.new_cache(), CostModel(model.backbone.config), model.memory
        for piece in x.split(1, dim=1):
            model(piece, past_key_values=cache)
        held = prices.cache_bytes(round(memory.slots(tokens)), drops_window_rows=False) + memory.extra_cache_bytes(
            tokens, 4
        )
        assert live_cache_bytes(cache) == held
        assert cost_report(model, tokens)["kv_bytes_per_token"] == pytest.approx(held / tokens)

"""PIE: a cache follows the edits of its text, compared with a reference implementation that goes token by token."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from helpers import saved_models
from helpers.architectures import BACKBONES, SIZES, ids
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from pondera import EditablePrompt, UserError
from pondera.core import spec
from pondera.inference import pie as module
from pondera.inference.pie import PIE, Edit, equal_runs
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

FAMILIES = {
    "llama": BACKBONES["llama"],
    "qwen3": BACKBONES["qwen3"],
    "gpt_neox": BACKBONES["gpt_neox"],  # rotates a quarter of the dimensions
    "helium": {"model_type": "helium", "head_dim": 16, **SIZES},  # pairs of neighboring dimensions
    "yarn": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        },
    },
}
OLD = ids(1, 60)[0].tolist()
NEW = ids(1, 9, seed=5)[0].tolist()
EDITS = {
    "insert": OLD[:20] + NEW + OLD[20:],
    "delete": OLD[:20] + OLD[27:],
    "replace": OLD[:20] + NEW + OLD[25:],
    "same length": OLD[:20] + NEW + OLD[29:],
    "two": OLD[:11] + NEW[:3] + OLD[11:35] + NEW[3:] + OLD[40:],
    "at the start": NEW + OLD,
    "first token": [(OLD[0] + 1) % 97, *OLD[1:]],
    "before the last": OLD[:-1] + NEW + OLD[-1:],
}


def model(name: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = {**FAMILIES[name], **more}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False).mul_(2)  # attention that is not uniform
    return made


def filled(lm: Any, tokens: list[int], cache: Any = None) -> Any:
    cache = DynamicCache(config=lm.config) if cache is None else cache
    lm(torch.tensor([tokens]), past_key_values=cache)
    return cache


def rows(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer."""
    return [layer.joined() if hasattr(layer, "joined") else (layer.keys, layer.values) for layer in cache.layers]


def same(found: Any, expected: Any, tolerance: float = 2e-4) -> None:
    for ours, theirs in zip(rows(found), rows(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def turned(key: torch.Tensor, position: int, frequency: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """A key with its pairs, as complex numbers, times exp(i frequency position)."""
    key, pairs = key.clone(), len(frequency)
    for pair in range(pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        number = torch.complex(key[..., first].double(), key[..., second].double())
        number = number * torch.exp(1j * frequency[pair].double() * position)
        key[..., first], key[..., second] = number.real.to(key), number.imag.to(key)
    return key


def reference(lm: Any, new: list[int], source: list[int | None], interleaved: bool = False) -> Any:
    """One token at a time: from the old cache, rotated back to position 0 and to the new one, or from the model."""
    old, cache = filled(lm, OLD), DynamicCache(config=lm.config)
    frequency = lm.get_decoder().rotary_emb.inv_freq
    for position, (token, at) in enumerate(zip(new, source, strict=True)):
        if at is None:
            lm(torch.tensor([[token]]), past_key_values=cache)
            continue
        for number, layer in enumerate(old.layers):
            key = turned(layer.keys[:, :, at : at + 1], -at, frequency, interleaved)
            key = turned(key, position, frequency, interleaved)
            cache.update(key, layer.values[:, :, at : at + 1], number)
    return cache


def sources(new: list[int], edit: Edit, runs: list[tuple[int, int, int]]) -> list[int | None]:
    """The old index of each token but the last; `None`: computed."""
    found: list[int | None] = [*range(edit.unchanged), *[None] * (len(new) - 1 - edit.unchanged)]
    for old_start, new_start, length in runs:
        found[new_start : new_start + length] = range(old_start, old_start + length)
    return found


RUNS = {
    "insert": [(20, 29, 39)],
    "delete": [(27, 20, 32)],
    "replace": [(25, 29, 34)],
    "same length": [(29, 29, 30)],
    "two": [(11, 14, 24), (40, 44, 19)],
    "at the start": [(0, 9, 59)],
    "first token": [(1, 1, 58)],
    "before the last": [],
}


@pytest.mark.parametrize("kept", ["DynamicCache", "PreallocatedCache()"])
@pytest.mark.parametrize(("family", "edit"), [*(("llama", name) for name in EDITS), *((f, "two") for f in FAMILIES)])
def test_it_equals_the_reference(family: str, edit: str, kept: str):
    lm, new = model(family), EDITS[edit]
    cache = filled(lm, OLD, None if kept == "DynamicCache" else spec.build(kept, "kv_cache").cache(lm))
    found = PIE(lm).edit(cache, OLD, new)
    moved = sum(length for *_, length in RUNS[edit])
    assert found.moved == moved and found.tokens == len(new) and cache.get_seq_length() == len(new) - 1
    expected = reference(lm, new[:-1], sources(new, found, RUNS[edit]), family == "helium")
    same(cache, expected)
    last = torch.tensor([new[-1:]])
    ours, theirs = (lm(last, past_key_values=each).logits for each in (cache, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("edit", EDITS)
def test_the_first_layer_and_all_before_the_first_edit_are_exact(edit: str):
    lm, new = model(), EDITS[edit]
    cache, whole = filled(lm, OLD), filled(lm, new[:-1])
    found = PIE(lm).edit(cache, OLD, new)
    for number, (ours, theirs) in enumerate(zip(rows(cache), rows(whole), strict=True)):
        end = None if number == 0 else found.unchanged
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[:, :, :end], other[:, :, :end], atol=1e-4, rtol=1e-4)


def test_later_layers_still_encode_the_old_text():
    lm, new = model(), EDITS["replace"]
    cache = filled(lm, OLD)
    PIE(lm).edit(cache, OLD, new)
    (_, ours), (_, theirs) = rows(cache)[1], rows(filled(lm, new[:-1]))[1]
    torch.testing.assert_close(ours[:, :, :29], theirs[:, :, :29], atol=1e-4, rtol=1e-4)
    assert float((ours[:, :, 29:] - theirs[:, :, 29:]).abs().max()) > 1e-2


@pytest.mark.parametrize("edit", EDITS)
def test_a_refresh_of_everything_is_exact(edit: str):
    lm, new = model(), EDITS[edit]
    cache = filled(lm, OLD)
    found = PIE(lm, refresh=100).edit(cache, OLD, new)
    assert found.moved == 0
    same(cache, filled(lm, new[:-1]))


def test_refresh_computes_the_first_tokens_after_each_edit():
    lm, new = model(), EDITS["two"]
    cache = filled(lm, OLD)
    found = PIE(lm, refresh=4).edit(cache, OLD, new)
    runs = [(old + 4, at + 4, length - 4) for old, at, length in RUNS["two"]]
    assert found == Edit(11, 35, len(new) - 46)
    same(cache, reference(lm, new[:-1], sources(new, found, runs)))


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (OLD, Edit(59, 0, 1)),
        (OLD + NEW, Edit(60, 0, 9)),
        (OLD[:30], Edit(29, 0, 1)),
        (OLD[:1], Edit(0, 0, 1)),
        (NEW, Edit(0, 0, 9)),
    ],
)
def test_edits_at_the_end_are_exact(new: list[int], expected: Edit):
    lm = model()
    cache = filled(lm, OLD)
    assert PIE(lm).edit(cache, OLD, new) == expected
    if len(new) > 1:
        same(cache, filled(lm, new[:-1]))
    assert cache.get_seq_length() == len(new) - 1


def test_an_edit_and_its_reverse_restore_the_cache():
    lm = model()
    cache, before = filled(lm, OLD), filled(lm, OLD[:-1])
    pie = PIE(lm)
    pie.edit(cache, OLD, EDITS["insert"])
    assert pie.edit(cache, EDITS["insert"], OLD) == Edit(20, 39, 1)
    same(cache, before)


def test_ids_after_those_in_the_cache_are_allowed():
    """After `generate`, the last generated token is not in the cache."""
    lm = model()
    cache = filled(lm, OLD[:-5])
    found = PIE(lm).edit(cache, torch.tensor([OLD]), torch.tensor(EDITS["insert"]))
    assert found == Edit(20, 35, 14)
    same(cache, reference(lm, EDITS["insert"][:-1], [*range(20), *[None] * 9, *range(20, 55), *[None] * 4]))


def test_generation_continues_the_edited_text():
    lm, new = model(), torch.tensor([EDITS["two"]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cache = filled(lm, OLD)
    PIE(lm, refresh=100).edit(cache, OLD, new)
    found = lm.generate(new, past_key_values=cache, **options)
    assert torch.equal(found, lm.generate(new, **options))


def test_bfloat16_keeps_its_precision():
    lm = model().bfloat16()
    cache = filled(lm, OLD)
    PIE(lm).edit(cache, OLD, EDITS["insert"])
    keys, exact = rows(cache)[0][0], rows(filled(lm, EDITS["insert"][:-1]))[0][0]
    assert keys.dtype == torch.bfloat16
    assert float((keys - exact).norm() / exact.norm()) < 0.01


def test_equal_runs_are_found_in_long_rewritten_texts():
    old, new = ids(1, 3000, seed=7)[0].tolist(), ids(1, 3000, seed=8)[0].tolist()
    new[500:700] = old[1000:1200]
    assert [(run.old, run.new, run.length) for run in equal_runs(old, new, 16)][1:-1] == [(1000, 500, 200)]


def test_equal_runs_are_in_order_and_do_not_overlap():
    repeated = [1, 2, 3, 4] * 10
    for old, new in (
        (repeated, repeated[:9] + repeated[:20]),
        (repeated[2:], repeated),
        ([5] * 30, [5] * 17 + [6] + [5] * 9),
    ):
        runs = list(equal_runs(old, new, 4))
        for before, after in zip(runs, runs[1:], strict=False):
            assert before.old + before.length <= after.old and before.new + before.length <= after.new
        for run in runs:
            assert old[run.old : run.old + run.length] == new[run.new : run.new + run.length]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BACKBONES["gpt2"], "rotary frequencies are not found"),
        (BACKBONES["mistral"], "DynamicSlidingWindowLayer does not keep"),
        (BACKBONES["gemma3"], "DynamicSlidingWindowLayer does not keep"),
        (
            {**BACKBONES["llama"], "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "changes frequencies",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "pad_token_id": 0, **SIZES},
            "keys of layer 1 .* not those of rotary positions",
        ),
    ],
)
def test_models_without_rotary_positions_in_all_layers_are_refused(config: dict[str, Any], reason: str):
    config = copy.deepcopy(config)
    torch.manual_seed(0)
    lm: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with pytest.raises(UserError, match=f"{reason}.*encode the edited text with a new cache"):
        PIE(lm)


def test_a_model_that_thinks_is_refused():
    config = AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), think="PonderLM2(thoughts=1)")
    with pytest.raises(UserError, match="think, chunk or memory method.*encode the edited text"):
        PIE(AdaptiveLM(config))


@pytest.mark.parametrize("kv_cache", ["H2O(8)", "H2O(200)", "KIVI(4)", "StreamingLLM(200)"])
def test_caches_that_do_not_keep_all_tokens_are_refused(kv_cache: str):
    lm = model()
    method = spec.build(kv_cache, "kv_cache")
    with pytest.raises(
        UserError, match=f"a cache of {method.__class__.__name__}.*give a DynamicCache or PreallocatedCache"
    ):
        PIE(lm).edit(filled(lm, OLD, method.cache(lm)), OLD, NEW)


def test_wrong_arguments_are_refused_and_the_cache_stays():
    lm = model()
    pie, cache = PIE(lm), filled(lm, OLD)
    pair = DynamicCache(config=lm.config)
    lm(ids(2, 12), past_key_values=pair)
    padded = spec.build("PreallocatedCache()", "kv_cache").cache(lm)
    lm(torch.tensor([OLD]), attention_mask=torch.tensor([[0] + [1] * 59]), past_key_values=padded)
    draft = spec.build("PreallocatedCache()", "kv_cache").cache(lm)
    draft.activate_past_recording()
    filled(lm, OLD, draft)
    for call, reason in (
        (lambda: pie.edit(cache, OLD[:9], NEW), "old_ids: 9 tokens, and the cache contains 60"),
        (lambda: pie.edit(cache, OLD, []), "new_ids: no tokens"),
        (lambda: pie.edit(cache, OLD, ids(2, 4)), "new_ids: 2 sequences"),
        (lambda: pie.edit(pair, OLD, NEW), "several sequences or padding"),
        (lambda: pie.edit(padded, OLD, NEW), "several sequences or padding"),
        (lambda: pie.edit(draft, OLD, NEW), "draft tokens"),
        (lambda: pie.edit(None, OLD, NEW), "a NoneType is not supported"),  # type: ignore[arg-type]
        (lambda: PIE(lm, refresh=-1), "refresh=-1"),
        (lambda: PIE(lm, least=0), "least=0"),
    ):
        with pytest.raises(UserError, match=reason):
            call()
    same(cache, filled(lm, OLD), tolerance=0)


@pytest.mark.parametrize("kept", ["DynamicCache", "PreallocatedCache()"])
def test_after_a_failed_call_the_cache_is_empty(kept: str, monkeypatch: pytest.MonkeyPatch):
    lm = model()
    pie, cache = (
        PIE(lm),
        DynamicCache(config=lm.config) if kept == "DynamicCache" else spec.build(kept, "kv_cache").cache(lm),
    )
    filled(lm, OLD, cache)
    with monkeypatch.context() as patch:
        patch.setattr(lm.model.layers[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pie.edit(cache, OLD, EDITS["two"])
    assert cache.get_seq_length() == 0
    same(filled(lm, OLD, cache), filled(lm, OLD))


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(module).failed == 0


TEXT = "The quick brown fox jumps over the lazy dog. It does so every morning, and nobody knows why."


@pytest.mark.parametrize("kv_cache", [None, "PreallocatedCache()"])
def test_a_prompt_is_edited_and_continued(kv_cache: str | None):
    tokenizer: PreTrainedTokenizerFast = saved_models.tokenizer()
    backbone = {**BACKBONES["llama"], "vocab_size": 280, "max_position_embeddings": 512}
    torch.manual_seed(0)
    lm: Any = AdaptiveLM(AdaptiveConfig(backbone=backbone, kv_cache=kv_cache)).eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def fresh(text: str) -> Any:
        given: Any = tokenizer(text, return_tensors="pt").input_ids
        return tokenizer.decode(lm.generate(given, **options)[0, given.shape[1] :], skip_special_tokens=True)

    prompt = EditablePrompt(lm, tokenizer, TEXT, refresh=1000)
    assert prompt.generate(**options) == fresh(TEXT) == prompt.generate(**options)
    edit = prompt.replace("lazy", "sleepy")
    assert prompt.text == TEXT.replace("lazy", "sleepy")
    assert edit.moved == 0 and edit.unchanged > 10 and edit.tokens == len(prompt.ids)
    assert prompt.generate(**options) == fresh(prompt.text)
    quick = EditablePrompt(lm, tokenizer, TEXT)
    moved = quick.replace("lazy", "sleepy")
    assert moved.recomputed < 16 < moved.moved and moved.tokens == edit.tokens
    for call, reason in (
        (lambda: prompt.replace("o", "a"), "contains 'o' 10 times"),
        (lambda: prompt.replace("", "a"), "0 times"),
        (lambda: prompt.edit(""), "text: no tokens"),
        (lambda: prompt.generate(num_beams=2), "num_beams=2"),
    ):
        with pytest.raises(UserError, match=reason):
            call()

"""The contract tests of the state of a cache, for every think, chunk and memory method, also with a KV-cache method.

A cache that was saved and loaded continues as if it had not been saved. What a cache names as its state is all that it
stores, with one batch row per sequence. Wrong arguments of `crop`, and files of another method or model, are refused.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.declared import forms
from helpers.fresh_process import copies
from safetensors import safe_open
from safetensors.torch import save_file

from pondera import UserError
from pondera.cache.state import BatchState, batch_sizes, state_of
from pondera.cost.measure import tensors_in
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

EXACT = {
    f"{seam}-{name}": ({seam: declared["exact"]}, "llama")
    for seam in ("think", "chunk", "memory")
    for name, declared in forms(seam).items()
    if "exact" in declared
}
LAYERS = {
    f"{name}-{family}": ({"think": name}, family)
    for name in ("PonderLM2(thoughts=1)", "PauseToken(pauses=2)")
    for family in ("gemma3", "qwen3_next")
} | {
    "concepts-gemma3": ({"chunk": "ConceptLM(chunk=3, codes=8, segments=4)"}, "gemma3"),
    "memory-gemma3": ({"memory": "ElasticMemory(block=4, order=4, samples=4)"}, "gemma3"),
}
COMBINED = {
    f"{method} with {kv_cache}": ({seam: method, "kv_cache": kv_cache}, "llama")
    for seam, method in (
        ("think", "PonderLM2(thoughts=1)"),
        ("think", "AdaptiveLatentCoT(steps=2, halting='random')"),
        ("think", "UniversalTransformer(steps=2, halting='random')"),
        ("chunk", "ConceptLM(chunk=3, codes=8, segments=4)"),
    )
    for kv_cache in (
        "H2O(10)",
        "SnapKV(10, window=3, kernel=3)",
        "KIVI(2, group=4, window=4, sinks=1)",
        "Keyformer(10)",
    )
}
CASES = EXACT | LAYERS | COMBINED
NOT_STATE = ("turn", "write", "slots", "table")
"""Attributes that the next call sets, the second cache over the same layers, and a table of the model."""
PIECES = (5, 6, 1, 1, 2)
SEEN = sum(PIECES)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@copies
def build(case: str) -> AdaptiveLM:
    chosen, family = CASES[case]
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[family]), **chosen))
    if model.chunk is not None:
        model(ids(2, 16), labels=ids(2, 16))  # initializes its codebooks
    for name, parameter in model.named_parameters():
        parameter.mul_(1.5)  # random embeddings of std 0.02 have almost no effect on logits
        if name.startswith("think.") or "heads" in name:
            parameter.normal_(std=0.3)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([ids(1, n, seed=n)[0] for n in (SEEN + 6, SEEN + 3, SEEN + 6)])


def filled(model: AdaptiveLM) -> Any:
    x_BT, mask_BT = batch()
    cache, seen = model.new_cache(), 0
    for piece in x_BT[:, :SEEN].split(PIECES, 1):
        seen += piece.shape[1]
        model(piece, attention_mask=mask_BT[:, :seen], past_key_values=cache)
    return cache


def continued(model: AdaptiveLM, cache: Any, start: int = SEEN) -> torch.Tensor:
    x_BT, mask_BT = batch()
    found = [
        model(x_BT[:, t : t + 1], attention_mask=mask_BT[:, : t + 1], past_key_values=cache).logits
        for t in range(start, x_BT.shape[1])
    ]
    return torch.cat(found, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_cache_continues_as_if_it_had_not_been_saved(case: str, tmp_path: Path):
    model = build(case)
    cache = filled(model)
    again = model.load_cache(cache.save(tmp_path / "cache.safetensors"))
    assert again is not cache and again.tokens == again.get_seq_length() == SEEN
    assert torch.equal(again.passes_BT, cache.passes_BT) and again.nbytes() > 0
    before = [tensor.clone() for tensor in tensors_in(state_of(again))]
    expected = continued(model, cache)
    after = list(tensors_in(state_of(again)))  # the two caches share no storage; its unused part may be NaN
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(continued(model, again), expected)


@pytest.mark.parametrize("how", ["deepcopy", "clone"])
@pytest.mark.parametrize("case", CASES)
def test_a_copy_continues_as_the_cache_and_shares_nothing_with_it(case: str, how: str):
    model = build(case)
    cache = filled(model)
    copied = copy.deepcopy(cache) if how == "deepcopy" else cache.clone()
    before = [tensor.clone() for tensor in tensors_in(state_of(copied))]
    expected = continued(model, cache)
    torch.testing.assert_close(list(tensors_in(state_of(copied))), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(continued(model, copied), expected)


@pytest.mark.parametrize("case", COMBINED)
def test_a_copy_of_an_empty_cache_is_filled_by_itself(case: str):
    model = build(case)
    cache: Any = model.new_cache()
    copied = copy.deepcopy(cache)
    first = continued(model, cache, 0)
    assert torch.equal(continued(model, copied, 0), first) and torch.equal(
        continued(model, model.new_cache(), 0), first
    )


def test_a_cache_of_a_kv_cache_method_is_not_pickled():
    for case in ("PonderLM2(thoughts=1) with H2O(10)", "UniversalTransformer(steps=2, halting='random') with H2O(10)"):
        with pytest.raises(UserError, match=r"cache\.save\(path\)"):
            pickle.dumps(filled(build(case)))


@pytest.mark.parametrize("case", [case for case in EXACT if not case.startswith("chunk-") or "-" not in case[6:]])
def test_a_loaded_cache_is_rolled_back_and_reordered(case: str, tmp_path: Path):
    model = build(case)
    cache = filled(model)
    again = model.load_cache(cache.save(tmp_path / "cache.safetensors"))
    order = torch.tensor([2, 2, 1])
    for each in (cache, again):
        each.crop(-2)
        each.reorder_cache(order)
    assert torch.equal(continued(model, again, SEEN - 2), continued(model, cache, SEEN - 2))


@pytest.mark.parametrize("case", CASES)
def test_the_stated_state_is_all_that_is_stored(case: str):
    cache = filled(build(case))
    stated = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(state_of(cache))}
    for layer in (*cache.layers, cache):
        parts = state_of(layer) if isinstance(layer, BatchState) else vars(layer)
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors_in(parts)} <= stated
        passing = [
            tensor
            for name, value in vars(layer).items()
            if name not in parts and name not in NOT_STATE
            for tensor in tensors_in(value)
        ]
        assert not passing, "a tensor that the state does not name"
    assert {size for size in batch_sizes(cache) if size} == {3} and cache.batch() == 3


@pytest.mark.parametrize("case", EXACT)
def test_a_wrong_number_of_tokens_to_remove_is_refused_and_changes_nothing(case: str):
    model = build(case)
    cache, other = filled(model), filled(model)
    for tokens, match in ((1, "negative number, or 0"), (-SEEN - 1, f"only {SEEN} tokens have been seen")):
        with pytest.raises(UserError, match=match):
            cache.crop(tokens)
    assert torch.equal(continued(model, cache), continued(model, other))


@pytest.mark.parametrize("case", EXACT)
def test_rows_are_repeated_before_and_after_there_are_any(case: str):
    model, x_BT = build(case), ids(2, 9)
    cache = model.new_cache()
    cache.batch_repeat_interleave(2)
    model(x_BT[:, :6], past_key_values=cache)
    alone = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    found = model(x_BT[[0, 0, 1, 1], 6:], past_key_values=cache).logits
    torch.testing.assert_close(found[::2], model(x_BT[:, 6:], past_key_values=alone).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1::2], found[::2], atol=1e-5, rtol=1e-5)


def test_an_empty_cache_is_saved_and_loaded(tmp_path: Path):
    for case in ("PonderLM2(thoughts=1)-gemma3", "memory-gemma3", "PonderLM2(thoughts=1) with H2O(10)"):
        model = build(case)
        again: Any = model.load_cache(model.new_cache().save(tmp_path / "empty"))  # type: ignore[attr-defined]
        assert again.tokens == 0 and torch.equal(continued(model, again, 0), continued(model, model.new_cache(), 0))


def test_a_cache_that_was_filled_with_less_effort_knows_it(tmp_path: Path):
    model, x = build("PonderLM2(thoughts=1)-gemma3"), ids(1, 9)
    cache: Any = model.new_cache()
    model(x[:, :6], past_key_values=cache, effort=0.0)
    again = model.load_cache(cache.save(tmp_path / "cache"))
    with pytest.raises(UserError, match="filled with 1 passes"):
        model(x[:, 6:], past_key_values=again)
    model(x[:, 6:], past_key_values=again, effort=0.0)


def rewritten(file: Path, change: Any) -> Path:
    """A copy of the file whose header or tensors `change` has changed."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    state = json.loads(metadata["cache"])
    change(metadata, state, tensors)
    save_file(tensors, file.with_name("changed"), metadata | {"cache": json.dumps(state)})
    return file.with_name("changed")


def test_a_file_of_another_method_or_model_is_refused(tmp_path: Path):
    file = filled(build("PonderLM2(thoughts=1)-gemma3")).save(tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"contains a cache of PonderLM2\(thoughts=1.*\), and this is a cache of PauseToken"
    ):
        build("PauseToken(pauses=2)-gemma3").load_cache(file)
    with pytest.raises(UserError, match="another kind of model"):
        build("PonderLM2(thoughts=1)-qwen3_next").load_cache(file)
    torch.manual_seed(0)
    deeper = copy.deepcopy(BACKBONES["llama"]) | {"num_hidden_layers": 4}
    llama = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), think="PauseToken(pauses=2)"))
    four = AdaptiveLM(AdaptiveConfig(backbone=deeper, think="PauseToken(pauses=2)"))
    with pytest.raises(UserError, match="3 layers where this model has 4"):
        four.load_cache(llama.new_cache().save(tmp_path / "three"))  # type: ignore[attr-defined]
    plain = AdaptiveLM(AdaptiveConfig(backbone=deeper))
    with pytest.raises(UserError, match="no method"):
        plain.load_cache(file)


def test_a_changed_file_is_refused(tmp_path: Path):
    model = build("memory-gemma3")
    file = filled(model).save(tmp_path / "cache")

    def refused(change: Any, match: str) -> None:
        with pytest.raises(UserError, match=match):
            model.load_cache(rewritten(file, change))

    def other_batch(metadata: dict, state: dict, tensors: dict) -> None:
        name = state["of"]["passes_BT"]["tensor"]
        tensors[name] = tensors[name][:2].clone()

    refused(other_batch, "2 and 3 batch rows")
    refused(lambda metadata, state, tensors: state["of"].update(tokens="many"), "'many' is not of type int")
    refused(lambda metadata, state, tensors: state["of"].update(crop=0), "another kind of model")
    refused(lambda metadata, state, tensors: state.update(state="DepthCache"), "another kind of model")
    refused(lambda metadata, state, tensors: state["of"].update(passes_BT={"tensor": "none"}), "not a saved cache")
    refused(lambda metadata, state, tensors: state["of"].update(passes_BT={"holder": "Path", "of": {}}), "not a saved")
    refused(lambda metadata, state, tensors: state["of"].update(layers=[None] * 6), "another kind")
    refused(lambda metadata, state, tensors: metadata.pop("methods"), "not a saved cache")
    (tmp_path / "text").write_text("not a cache")
    with pytest.raises(UserError, match="not a saved cache"):
        model.load_cache(tmp_path / "text")
    with pytest.raises(UserError, match="no such file"):
        model.load_cache(tmp_path / "none")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case in COMBINED or "gemma3" in case and "think" in CASES[case][0]]
)
def test_draft_tokens_are_not_saved_before_the_crop_that_follows(case: str, tmp_path: Path):
    model = build(case)
    cache: Any = model.new_cache()
    cache.activate_past_recording()
    cache.save(tmp_path / "empty")
    model(ids(1, 9), past_key_values=cache)
    with pytest.raises(UserError, match="draft tokens"):
        cache.save(tmp_path / "cache")
    cache.crop(-2)
    again: Any = model.load_cache(cache.save(tmp_path / "cache"))
    for number in range(4 if "think" in CASES[case][0] else 0):  # a concept cache evicts in the middle of a call
        x_B1 = ids(1, 1, seed=number)
        assert torch.equal(model(x_B1, past_key_values=again).logits, model(x_B1, past_key_values=cache).logits)
        cache.crop(0)  # the loaded cache records nothing, so it need not be told


@pytest.mark.parametrize("chosen", [{"think": "PonderLM2(thoughts=1)"}, {"kv_cache": "H2O(64)"}], ids=str)
def test_a_file_of_another_model_is_refused_by_name(chosen: dict[str, Any], tmp_path: Path):
    def model(seed: int = 0, **sizes: Any) -> Any:
        torch.manual_seed(seed)
        return AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]) | sizes, **chosen)).eval()

    own = model()
    cache = own.new_cache()
    own(ids(2, 8), past_key_values=cache)
    file = cache.save(tmp_path / "cache")
    for other, match in (
        (model(head_dim=32), "head width 16, and this model has 32"),
        (model(num_key_value_heads=1), "KV heads 2, and this model has 1"),
        (model().to(torch.bfloat16), "dtype float32, and this model has bfloat16"),
        (model(seed=1), "other weights"),
    ):
        with pytest.raises(UserError, match=f"cache: belongs to another kind of model.*{match}"):
            other.load_cache(file)
    assert model().load_cache(file).get_seq_length() == 8


def test_a_damaged_file_is_refused_by_name(tmp_path: Path):
    model = AdaptiveLM(AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), kv_cache="H2O(64)")).eval()
    cache: Any = model.new_cache()
    model(ids(2, 8), past_key_values=cache)
    file = cache.save(tmp_path / "cache")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())

    def text(old: str, new: str) -> dict[str, str]:
        assert old in metadata["cache"]
        return metadata | {"cache": metadata["cache"].replace(old, new)}

    damaged = tmp_path / "damaged"
    for header, parts in (
        (metadata | {"cache": "[" * 100_000 + "]" * 100_000}, tensors),
        (metadata | {"model": "{}"}, tensors),
        (metadata | {"model": "[" * 100_000}, tensors),
        (metadata, tensors | {"0": tensors["0"].flatten()}),
        (metadata, tensors | {"0": tensors["0"].long()}),
        (text('"used": 8', '"used": 1000'), tensors),
        (text('"used": 8', '"used": -1'), tensors),
        (text('"seen": 8', '"seen": 4'), tensors),
        (text('"seen": 8', '"seen": -3'), tensors),
    ):
        save_file(parts, damaged, header)
        with pytest.raises(UserError, match="damaged: not a saved cache"):
            model.load_cache(damaged)
    with pytest.raises(UserError, match="no such file"):
        model.load_cache(tmp_path)
    for place in (tmp_path, file / "below"):
        with pytest.raises(UserError, match=f"{place.name}: .*give"):
            cache.save(place)


def test_an_impossible_number_of_tokens_is_refused(tmp_path: Path):
    model = build("PonderLM2(thoughts=1)-gemma3")
    file = filled(model).save(tmp_path / "cache")
    for tokens in (-3, 4, 1000):
        with pytest.raises(UserError, match="changed: not a saved cache .*tokens="):
            model.load_cache(rewritten(file, lambda metadata, state, tensors, n=tokens: state["of"].update(tokens=n)))

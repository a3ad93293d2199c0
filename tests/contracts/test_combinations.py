"""The contract tests of combinations: every think or chunk method with every KV-cache method, and with a head.

At a budget that no sequence exceeds, logits with a compressed cache equal those with the method's own cache: in pieces, in a
padded batch, after rollback and with beam search. At a small budget the cache has fewer bytes, and a sequence gets the same
logits in a batch and alone. Pairs that cannot be combined raise an error with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import UserError
from pondera.core import spec
from pondera.cost.measure import live_cache_bytes
from pondera.evaluation.chunked_forward import chunked_forward
from pondera.evaluation.cost_report import cost_report
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import IMPOSSIBLE, AdaptiveConfig

FAST = "codes=4, vectors=64, fitting='kmeans', branches=1"
METHODS = {
    "PonderLM2": {"think": "PonderLM2(thoughts=1)"},
    "PauseToken": {"think": "PauseToken(pauses=1)"},
    "AdaptiveLatentCoT": {"think": "AdaptiveLatentCoT(steps=2, halting='random')"},
    "ThinkAtHard": {"think": "ThinkAtHard(steps=1, threshold=0.5)"},
    "PonderLM": {"think": "PonderLM(steps=2)"},
    "AdaPonderLM": {"think": "AdaPonderLM(steps=2, halting='random')"},
    "UniversalTransformer": {"think": "UniversalTransformer(steps=2, halting='random')"},
    "PonderLM3": {"think": "PonderLM3(thoughts=2)"},
    "ConceptLM": {"chunk": "ConceptLM(chunk=3, codes=8, segments=4)"},
    "ConceptLM-think": {
        "chunk": "ConceptLM(chunk=3, codes=8, segments=4, think=PonderLM2(thoughts=1, eval_rounds='exact'))"
    },
}
EXACT = {
    "PreallocatedCache": "PreallocatedCache()",
    "StreamingLLM": "StreamingLLM(200)",
    "H2O": "H2O(200)",
    "SnapKV": "SnapKV(200, window=4)",
    "A2SF": "A2SF(200)",
    "Keyformer": "Keyformer(200)",
    "TreeKV": "TreeKV(200)",
    "TokenSelect": "TokenSelect(200)",
    "AdaKV": "AdaKV(SnapKV(200, window=4))",
    "RefreshKV": "RefreshKV(200)",
    "CriticalKV": "CriticalKV(SnapKV(200, window=4))",
    "KeyDiff": "KeyDiff(200)",
    "PyramidKV": "PyramidKV(SnapKV(200, window=4), beta=1)",
    "TOVA": "TOVA(200)",
    "LagKV": "LagKV(200, lag=8)",
    "LazyEviction": "LazyEviction(200, window=8)",
    "CurDKV": "CurDKV(200)",
    "RandomEviction": "RandomEviction(200)",
    "KIVI": "KIVI(8, window=200)",
    "TurboQuant": "TurboQuant(4, window=200)",
    "VQKV": f"VQKV(2, window=200, {FAST})",
}
TIGHT = {
    "StreamingLLM": "StreamingLLM(10, sinks=2)",
    "H2O": "H2O(10)",
    "SnapKV": "SnapKV(10, window=3, kernel=3)",
    "TreeKV": "TreeKV(10, sinks=1, recent=2)",
    "CriticalKV": "CriticalKV(SnapKV(10, window=4))",
    "KeyDiff": "KeyDiff(10, recent=2)",
    "PyramidKV": "PyramidKV(SnapKV(10, window=4), beta=2)",
    "TOVA": "TOVA(10)",
    "LagKV": "LagKV(10, lag=3, sinks=2)",
    "LazyEviction": "LazyEviction(10, window=3, threshold=0.08)",
    "CurDKV": "CurDKV(10, window=4)",
    "RandomEviction": "RandomEviction(10, sinks=1)",
    "KIVI": "KIVI(2, group=4, window=4, sinks=1)",
    "TurboQuant": "TurboQuant(2, window=5, sinks=1, flush_size=2)",
    "VQKV": f"VQKV(2, window=5, sinks=1, flush_size=2, {FAST})",
}
REFUSED = {
    "FastKV": "FastKV(SnapKV(8, window=4))",
    "LazyLLM": "LazyLLM()",
    "DapQ": "DapQ(SnapKV(8, window=4))",
    "SentenceKV": "SentenceKV(SnapKV(8, window=4), ends=[3])",
    "KVzip": "KVzip()",
    "Coded": "Coded(SnapKV(200, window=4), KIVI(4))",
    "ExpectedAttention": "ExpectedAttention()",
    "Compactor": "Compactor()",
    "FisherVQ": "FisherVQ(3, codes=4, vectors=64, texts=1, text_tokens=16)",
}
PIECES = (5, 4, 1, 1, 2)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(method: str, kv_cache: str | None = None, backbone: str = "llama", **more: Any) -> AdaptiveLM:
    torch.manual_seed(0)
    config = AdaptiveConfig(backbone=copy.deepcopy(BACKBONES[backbone]), kv_cache=kv_cache, **METHODS[method], **more)
    model = AdaptiveLM(config).eval()
    if model.kv_cache is not None and not model.kv_cache.fitted:
        model.kv_cache.fit(model, [ids(4, 40)])  # type: ignore[arg-type]
    return model


def own(model: AdaptiveLM) -> AdaptiveLM:
    """The same model with the think or chunk method's own cache, which evicts nothing."""
    plain = copy.copy(model)
    plain.__dict__ = {**model.__dict__, "_modules": {**model._modules, "kv_cache": None}}
    return plain


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x_BT = ids(2, 13, seed=3)
    mask_BT = torch.ones_like(x_BT)
    mask_BT[0, :3] = 0
    return x_BT, mask_BT


def read(model: AdaptiveLM, x_BT: torch.Tensor, mask_BT: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
    cache, seen, found = model.new_cache() if cache is None else cache, 0, []
    for piece in x_BT.split(PIECES, 1):
        seen += piece.shape[1]
        mask = None if mask_BT is None else mask_BT[:, :seen]
        found.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, 1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_every_method_is_combined():
    known = spec.index()
    assert {case.partition("-")[0] for case in METHODS} == {
        name for name, each in known.items() if each.seam in ("think", "chunk")
    }
    assert EXACT.keys() | REFUSED.keys() == {name for name, each in known.items() if each.seam == "kv_cache"}


@pytest.mark.parametrize("kv_cache", EXACT)
@pytest.mark.parametrize("method", METHODS)
def test_at_full_budget_nothing_changes(method: str, kv_cache: str):
    model = build(method, EXACT[kv_cache])
    x_BT, mask_BT = batch()
    close(read(model, x_BT, mask_BT)[mask_BT.bool()], read(own(model), x_BT, mask_BT)[mask_BT.bool()])


@pytest.mark.parametrize("backbone", ["mistral", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("method", ["PonderLM2", "AdaptiveLatentCoT", "UniversalTransformer", "PonderLM3"])
def test_at_full_budget_nothing_changes_on_other_backbones(method: str, backbone: str):
    if backbone == "mistral":
        with pytest.raises(UserError, match="there is nothing to compress"):
            build(method, "H2O(200)", backbone).new_cache()
        return
    model = build(method, "H2O(200)", backbone)
    x_BT, mask_BT = batch()
    close(read(model, x_BT, mask_BT)[mask_BT.bool()], read(own(model), x_BT, mask_BT)[mask_BT.bool()])


@pytest.mark.parametrize("kv_cache", TIGHT)
@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_of_a_padded_batch_gets_what_it_gets_alone(method: str, kv_cache: str):
    model = build(method, TIGHT[kv_cache])
    x_BT, mask_BT = batch()
    together = read(model, x_BT, mask_BT)
    for row in range(2):
        real_T = mask_BT[row].bool()
        cache, seen, alone = model.new_cache(), 0, []
        for piece, keep in zip(x_BT[row : row + 1].split(PIECES, 1), real_T.split(PIECES), strict=True):
            part = piece[:, keep]
            seen += part.shape[1]
            if part.shape[1]:
                alone.append(model(part, past_key_values=cache).logits)
        close(together[row, real_T], torch.cat(alone, 1)[0])


@pytest.mark.parametrize("kv_cache", TIGHT)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_fall_and_so_does_the_cost(method: str, kv_cache: str):
    model = build(method, TIGHT[kv_cache])
    x_BT, caches = ids(1, 90), []
    for each in (model, own(model)):
        caches.append(each.new_cache())
        each(x_BT[:, :80], past_key_values=caches[-1])
        for token in x_BT[:, 80:].split(1, 1):
            each(token, past_key_values=caches[-1])
    small, large = (cache.nbytes() for cache in caches)
    assert small < 0.75 * large and caches[0].get_seq_length() == 90
    costs = [cost_report(each, 90)["kv_bytes_per_token"] for each in (model, own(model))]
    assert costs[0] < 0.75 * costs[1]


@pytest.mark.parametrize("method", ["ConceptLM", "ConceptLM-think"])
def test_slots_of_chunks_are_priced_beside_a_compressed_cache(method: str):
    model = build(method, "StreamingLLM(10, sinks=2)")
    cache = model.new_cache()
    for _ in chunked_forward(model, cache, ids(1, 90), prompt=45):
        pass
    held = sum(map(live_cache_bytes, (cache, cache.concepts))) + cache.encoded_BWD.nbytes + cache.used_BWD.nbytes
    assert cost_report(model, 90)["kv_bytes_per_token"] * 90 == pytest.approx(held)


@pytest.mark.parametrize("kv_cache", ["H2O", "SnapKV", "TreeKV", "KIVI", "VQKV"])
@pytest.mark.parametrize("method", METHODS)
def test_drafts_that_are_rolled_back_leave_no_trace(method: str, kv_cache: str):
    model, x_BT = build(method, TIGHT[kv_cache]), ids(1, 20)
    plain, drafted = model.new_cache(), model.new_cache()
    model(x_BT[:, :12], past_key_values=plain)
    model(x_BT[:, :12], past_key_values=drafted)
    drafted.activate_past_recording()
    model(ids(1, 4, seed=9), past_key_values=drafted)
    drafted.crop(-4)
    close(model(x_BT[:, 12:13], past_key_values=drafted).logits, model(x_BT[:, 12:13], past_key_values=plain).logits)


@pytest.mark.parametrize(
    "kv_cache", ["H2O(10)", "A2SF(10, alpha=0.5)", "Keyformer(10)", TIGHT["TreeKV"], TIGHT["KIVI"]]
)
@pytest.mark.parametrize("method", ["PonderLM2", "AdaptiveLatentCoT", "UniversalTransformer", "PonderLM3"])
def test_drafts_that_are_rolled_back_change_no_later_eviction(method: str, kv_cache: str):
    model, x_BT = build(method, kv_cache), ids(2, 20, seed=2)

    def logits(drafts: bool, after: int) -> torch.Tensor:
        """Of single steps, each followed by drafts that are rolled back, or run together with `after` of them."""
        cache, found = model.new_cache(), []
        cache.activate_past_recording()
        model(x_BT[:, :12], past_key_values=cache)
        cache.crop(0)
        for number in range(12, 20):
            step = torch.cat([x_BT[:, number : number + 1], ids(2, after, seed=number)], 1)
            found.append(model(step, past_key_values=cache).logits[:, :1])
            cache.crop(-after)
            if drafts:
                model(ids(2, 2, seed=77), past_key_values=cache)
                cache.crop(-2)
        return torch.cat(found, 1)

    plain = logits(drafts=False, after=0)
    close(logits(drafts=True, after=0), plain)
    close(logits(drafts=False, after=2), plain)


@pytest.mark.parametrize("kv_cache", ["H2O", "KIVI"])
@pytest.mark.parametrize("method", ["PonderLM2", "AdaptiveLatentCoT", "PonderLM3"])
def test_decoding_after_generate_with_drafts_keeps_the_budget(method: str, kv_cache: str):
    model, x_BT = build(method, TIGHT[kv_cache]), ids(1, 5).repeat(1, 4)
    options: dict[str, Any] = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    caches: list[Any] = [model.new_cache(), model.new_cache()]
    for cache, lookup in zip(caches, ({"prompt_lookup_num_tokens": 3}, {}), strict=True):
        found = model.generate(x_BT, past_key_values=cache, max_new_tokens=6, **options, **lookup)
        model.generate(found, past_key_values=cache, max_new_tokens=60, **options)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert live_cache_bytes(caches[0]) <= 1.5 * live_cache_bytes(caches[1])


@pytest.mark.parametrize("kv_cache", ["H2O", "KIVI"])
@pytest.mark.parametrize("method", ["PonderLM2", "AdaptiveLatentCoT", "UniversalTransformer", "PonderLM3"])
def test_a_cache_from_inference_mode_is_continued_outside_of_it(method: str, kv_cache: str):
    model, x_BT = build(method, TIGHT[kv_cache]), ids(2, 20)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache: Any = model.new_cache()
        cache.activate_past_recording()
        with mode():
            model(x_BT[:, :12], past_key_values=cache)
        cache.crop(-2)
        steps = [model(x_BT[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
        found.append(torch.cat(steps, 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["PonderLM2", "AdaptiveLatentCoT", "UniversalTransformer", "PonderLM3"])
def test_gradients_of_several_calls_equal_those_of_one(method: str):
    model, x_BT = build(method, "H2O(200)"), ids(2, 10)
    weight = model.get_input_embeddings().weight

    def gradient(pieces: list[int]) -> torch.Tensor:
        cache = model.new_cache()
        with torch.enable_grad():
            logits = [model(piece, past_key_values=cache).logits for piece in x_BT.split(pieces, 1)]
            return torch.autograd.grad(torch.cat(logits, 1).square().sum(), weight)[0]  # type: ignore[arg-type]

    torch.testing.assert_close(gradient([5, 1, 1, 3]), gradient([10]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_the_drafts_stays(method: str):
    model, x_BT = build(method, "H2O(200)"), ids(1, 16)
    cache = model.new_cache()
    model(x_BT[:, :9], past_key_values=cache)
    cache.activate_past_recording()
    model(x_BT[:, 9:14], past_key_values=cache)
    cache.crop(-3)
    plain = model.new_cache()
    model(x_BT[:, :9], past_key_values=plain)
    model(x_BT[:, 9:11], past_key_values=plain)
    close(model(x_BT[:, 14:15], past_key_values=cache).logits, model(x_BT[:, 14:15], past_key_values=plain).logits)


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_sampling(method: str):
    model = build(method, "H2O(200)")
    x_BT, mask_BT = batch()
    given: dict[str, Any] = dict(attention_mask=mask_BT, max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    expected = own(model).generate(x_BT, num_beams=3, do_sample=False, **given)
    assert torch.equal(model.generate(x_BT, num_beams=3, do_sample=False, **given), expected)
    assert model.generate(x_BT, do_sample=True, num_return_sequences=2, **given).shape == (4, 19)


@pytest.mark.parametrize("kv_cache", TIGHT)
@pytest.mark.parametrize("method", METHODS)
def test_generation_at_a_small_budget_runs_in_a_batch(method: str, kv_cache: str):
    model = build(method, TIGHT[kv_cache])
    x_BT, mask_BT = batch()
    found = model.generate(
        x_BT, attention_mask=mask_BT, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert found.shape == (2, 21)


@pytest.mark.parametrize("method", METHODS)
def test_heads_combine(method: str):
    model = build(method, "H2O(200)", head="VQLogits(codes=16, bias=False)")
    x_BT, mask_BT = batch()
    close(read(model, x_BT, mask_BT)[mask_BT.bool()], read(own(model), x_BT, mask_BT)[mask_BT.bool()])


@pytest.mark.parametrize("kv_cache", REFUSED)
def test_methods_that_cannot_be_right_are_refused(kv_cache: str):
    with pytest.raises(
        UserError,
        match="drops tokens|moves queries|runs the model again|rotates (queries|keys) back|in one pass|of several passes|"
        "finds sentences",
    ):
        build("UniversalTransformer", REFUSED[kv_cache]).new_cache()


@pytest.mark.parametrize("kv_cache", ["PreallocatedCache", "H2O", "KIVI"])
def test_halted_tokens_that_attend_without_slots_are_refused(kv_cache: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "dense", {"think": "AdaPonderLM(steps=2, top_k=None, threshold=0.3, halted='dense')"})
    model = build("dense", EXACT[kv_cache])
    for call in (model.new_cache, lambda: model(ids(1, 4), use_cache=True)):
        with pytest.raises(UserError, match="halted='dense'.*KV-cache method.*halted='freeze'"):
            call()
    assert own(model)(ids(1, 4), use_cache=True).past_key_values is not None


@pytest.mark.parametrize("pair", IMPOSSIBLE)
def test_pairs_that_cannot_be_combined_say_why(pair: tuple[str, str]):
    chosen = {
        "think": "PonderLM2(thoughts=1)",
        "chunk": "ConceptLM()",
        "memory": "ElasticMemory()",
        "kv_cache": "H2O(8)",
    }
    with pytest.raises(UserError, match="cannot be combined: .*leave one of them out"):
        AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), **{seam: chosen[seam] for seam in pair})


@pytest.mark.parametrize("method", ["PonderLM2", "UniversalTransformer", "ConceptLM"])
def test_a_compressed_model_is_saved_and_loaded(method: str, tmp_path):
    model, x_BT = build(method, TIGHT["VQKV"]), ids(1, 30)
    model.save_pretrained(tmp_path)
    again = AdaptiveLM.from_pretrained(tmp_path).eval()
    assert again.config.kv_cache == model.config.kv_cache
    close(read(again, x_BT[:, :13]), read(model, x_BT[:, :13]))


@pytest.mark.parametrize("memory", ["ElasticMemory(block=4, order=4, samples=4)", "TransformerXL(block=4, mems=4)"])
def test_a_trained_memory_combines_with_a_head(memory: str):
    torch.manual_seed(0)
    config = AdaptiveConfig(
        backbone=copy.deepcopy(BACKBONES["llama"]), memory=memory, head="VQLogits(codes=16, bias=False)"
    )
    model, x_BT = AdaptiveLM(config).eval(), ids(2, 13)
    close(read(model, x_BT), model(x_BT).logits)
    with torch.enable_grad():
        loss = model.train()(x_BT, labels=x_BT).loss
        loss.backward()
    assert model.head is not None and all(p.grad is not None for p in model.head.parameters())

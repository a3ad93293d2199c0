"""KVzip: the slots that the model needs to repeat its context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.policy_reference import kept, model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pondera import UserError
from pondera.cache.slot_layer import KVStoreLayer
from pondera.core import spec
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.dap_q import DapQ
from pondera.methods.kv_cache.kv_zip import KVzip


def repeated(lm: Any, x_1T: torch.Tensor, prompt: list[int], chunk: int, sinks: int) -> torch.Tensor:
    """Reference implementation, ``[layers, G, T]``: attention weights of the stock model in eager mode.

    A softmax over some of the keys is that over all keys, divided by the sum of their weights.
    """
    T, found = x_1T.shape[1], []
    eager = copy.deepcopy(lm)
    eager.set_attn_implementation("eager")
    for begin in range(0, T, chunk):
        end = min(T, begin + chunk)
        given = torch.cat([torch.tensor([prompt], dtype=torch.long), x_1T[:, max(0, begin - 8) : end]], dim=1)
        cache = DynamicCache(config=eager.config)
        eager(x_1T, past_key_values=cache)
        seen = eager(given, past_key_values=cache, output_attentions=True).attentions
        columns = [*range(min(sinks, begin)), *range(begin, end), *range(T, T + given.shape[1])]
        of_part = slice(min(sinks, begin), min(sinks, begin) + end - begin)
        layers = []
        for weight in seen:
            some = weight[0][:, :, columns]
            some = (some / some.sum(-1, keepdim=True))[:, :, of_part].amax(1)
            layers.append(some.unflatten(0, (2, -1)).amax(1))
        found.append(torch.stack(layers))
    return torch.cat(found, dim=2)


def filled(text: str, lm: Any, x_BT: torch.Tensor, **given: Any) -> KVCache:
    cache = spec.build(text, "kv_cache").cache(lm)
    with torch.no_grad():
        lm(x_BT, past_key_values=cache, **given)
    return cache


def stored(cache: KVCache, row: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Positions, keys and values of each head of each layer, in the order of the sequence."""
    found = []
    for layer in cache.kept:
        assert isinstance(layer, KVStoreLayer)
        for table in layer.tables:
            for head in range(len(table.heads)):
                order = table.position[row, head].argsort()
                order = order[table.position[row, head][order] >= 0]
                found.append(tuple(x[row, head][order] for x in (table.position, table.keys, table.values)))
    return found


@pytest.mark.parametrize(("prompt", "chunk", "sinks"), [([], 99, 0), ([5, 9, 2], 99, 4), ([], 13, 0), ([7], 13, 3)])
def test_a_slot_is_as_important_as_its_highest_attention_from_the_repetition(prompt: list, chunk: int, sinks: int):
    lm, x = model(), ids(1, 40)
    score = repeated(lm, x, prompt, chunk, sinks)
    score[..., :sinks] = torch.inf
    cache = filled(f"KVzip(12, chunk={chunk}, prompt={prompt}, sinks={sinks})", lm, x)
    newest_first = sorted(
        ((float(score[layer, head, t]), t, layer, head) for layer in range(2) for head in range(2) for t in range(40)),
        reverse=True,
    )
    expected = {(layer, head, t) for _, t, layer, head in newest_first[: 12 * 4]}
    assert {(n, g, t) for n, layer in enumerate(kept(cache)) for g, head in enumerate(layer) for t in head} == expected


def test_heads_share_a_budget_within_the_model_a_layer_or_not_at_all():
    lm, x = model(), ids(1, 40)
    score = repeated(lm, x, [], 99, 0)
    sizes = {}
    for level in ("model", "layer", "head"):
        cache = filled(f"KVzip(0.25, level={level!r}, sinks=0)", lm, x)
        sizes[level] = [[len(head) for head in layer] for layer in kept(cache)]
        if level == "head":
            for found, scores in zip(kept(cache), score, strict=True):
                assert found == [sorted(head.topk(10).indices.tolist()) for head in scores]
    assert [sum(map(sum, each)) for each in sizes.values()] == [40, 40, 40]
    assert sizes["head"] == [[10, 10], [10, 10]] and all(sum(layer) == 20 for layer in sizes["layer"])
    assert any(sum(layer) != 20 for layer in sizes["model"]) and any(layer != [10, 10] for layer in sizes["layer"])


@pytest.mark.parametrize("text", ["KVzip(0.3, chunk=9, sinks=2, prompt=[4, 4])", "KVzip(10, level='head')"])
def test_a_padded_row_keeps_what_it_keeps_alone(text: str):
    lm, rows = model(), [ids(1, n, seed=n)[0] for n in (40, 23, 3)]
    x, mask = left_padded(rows)
    together = filled(text, lm, x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for number, row in enumerate(rows):
        pads = 40 - len(row)
        for a, b in zip(stored(together, number), stored(filled(text, lm, row[None])), strict=True):
            assert (a[0] - pads).tolist() == b[0].tolist()
            torch.testing.assert_close(a[1:], b[1:], atol=1e-5, rtol=1e-5)


def test_the_second_run_leaves_no_trace():
    lm, x = model(3, "qwen3_mixed"), ids(2, 30)
    stock = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(x, past_key_values=stock)
    cache = filled("KVzip(8, chunk=7)", lm, x)
    assert cache.get_seq_length() == 30 and len(cache.kept) < len(cache.layers)
    layers: list[Any] = stock.layers
    for layer, whole in zip(cache.layers, layers, strict=True):
        if not isinstance(layer, KVStoreLayer):  # a sliding window
            window: Any = layer
            assert torch.equal(window.keys, whole.keys) and torch.equal(window.values, whole.values)
            continue
        assert set(layer.state) == {"padding"}
        for head, table in enumerate(layer.tables):
            for row in range(2):
                real = table.position[row, 0] >= 0
                at = table.position[row, 0][real].long()
                assert torch.equal(table.keys[row, 0][real], whole.keys[row, head, at])
                assert torch.equal(table.values[row, 0][real], whole.values[row, head, at])


def test_one_compressed_context_serves_many_questions():
    lm, context = model(), ids(1, 40)
    cache = filled("KVzip(0.25, sinks=1)", lm, context)
    before = stored(cache)
    found = []
    for seed in (3, 4, 3):
        question = ids(1, 6, seed=seed)
        copied = copy.deepcopy(cache)
        options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        said = lm.generate(torch.cat([context, question], 1), past_key_values=cache, **options)
        again = lm.generate(torch.cat([context, question], 1), past_key_values=copied, **options)
        assert torch.equal(said, again)
        assert min(len(head) for layer in kept(cache) for head in layer) >= 10  # the question is in every head
        cache.crop(40 - cache.get_seq_length())
        assert all(
            torch.equal(a, b)
            for old, new in zip(before, stored(cache), strict=True)
            for a, b in zip(old, new, strict=True)
        )
        found.append(said)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_bytes_are_those_of_a_sequence_in_all_layers():
    # A slot has a key and a value of 16 numbers; 2 layers have 2 heads each.
    cache = filled(f"KVzip('{12 * 2 * 2 * 2 * 16 * 4} B')", model(), ids(2, 40))
    assert sum(len(head) for layer in kept(cache) for head in layer) == 12 * 4


def test_generate_compresses_its_prompt():
    lm, x = model(), ids(1, 40)
    cache = KVzip(0.25).cache(lm)
    lm.generate(x, max_new_tokens=5, do_sample=False, pad_token_id=0, past_key_values=cache)
    assert sum(len(head) for layer in kept(cache) for head in layer) == 4 * (10 + 4)
    first = filled("KVzip(0.25)", lm, x)
    assert [[[t for t in head if t < 40] for head in layer] for layer in kept(cache)] == kept(first)


def test_chunked_prefill_is_one_context_if_the_chunks_are_recorded():
    lm, x = model(), ids(1, 42)
    cache = KVzip(0.25).cache(lm)
    cache.activate_past_recording()
    for part in x[:, :40].split([17, 20, 3], dim=1):
        lm(part, past_key_values=cache)
    assert all(len(head) == 40 for layer in kept(cache) for head in layer)
    lm(ids(1, 4, seed=8), past_key_values=cache)
    cache.crop(-4)
    lm(x[:, 40:], past_key_values=cache)
    cache.crop(-2)
    assert kept(cache) == kept(filled("KVzip(0.25)", lm, x[:, :40]))


def test_the_model_runs_twice_only_if_something_is_evicted():
    lm, x, calls = model(), ids(1, 20), []
    handle = lm.get_decoder().layers[0].register_forward_hook(lambda _, args, out: calls.append(args[0].shape[1]))
    try:
        filled("KVzip(20)", lm, x)
        filled("KVzip(19, chunk=12, prompt=[1, 2])", lm, x)
    finally:
        handle.remove()
    assert calls[-4:] == [20, 20, 14, 2 + 8 + 8]


def test_bf16_and_training_mode():
    lm, x = copy.deepcopy(model()).to(torch.bfloat16).train(), ids(2, 30)
    cache = filled("KVzip(0.5, chunk=11)", lm, x)
    assert lm.training and sum(len(head) for layer in kept(cache) for head in layer) == 60


def test_what_does_not_fit_is_refused_in_words():
    config = dict(BACKBONES["gpt2"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    assert kept(filled("KVzip(0.5)", lm, ids(1, 60)))
    with pytest.raises(UserError, match=r"position 140, and this gpt2 has 128 positions.*chunk=512"):
        filled("KVzip(0.5)", lm, ids(1, 70))
    with pytest.raises(UserError, match="think or chunk method"):
        KVzip().token_cache(model(), 1)
    with pytest.raises(UserError, match="an observation window at the end"):
        DapQ(KVzip())
    for text, says in [
        ("KVzip(level='all')", "level"),
        ("KVzip(chunk=0)", "1 or more"),
        ("KVzip(prompt=[-1])", "token ids"),
        ("KVzip(3)", "at least 4"),
        ("KVzip(sinks=-1)", "0 or more"),
        ("KVzip([0.5])", "2 layers are compressed"),
    ]:
        with pytest.raises(UserError, match=says):
            spec.build(text, "kv_cache").cache(model())

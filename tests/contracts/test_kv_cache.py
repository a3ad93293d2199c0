"""The contract tests of the seam `kv_cache`, for every method in the index and every backbone family.

With a budget that no sequence exceeds, logits are bit-identical to those of the stock cache. Evicting a token equals masking
it. Padding and other batch rows change nothing. The storage becomes smaller. `test_kv_cache_drafts`, `test_kv_cache_kept` and
`test_kv_cache_refused` have further tests of all methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import ids, left_padded
from helpers.cache_methods import (
    CODED,
    COMPUTING_LESS,
    EVICTING,
    FORMS,
    LARGE,
    ONE_BY_ONE,
    REFUSED,
    SLOTS,
    SMALL,
    feed,
    kept,
    large,
    model,
    small,
)
from transformers import DynamicCache

from pondera.cache.slot_layer import KVStoreLayer
from pondera.cache.state import state_of
from pondera.cost.measure import tensors_in
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.policy import BudgetedPolicy
from pondera.methods.kv_cache.common.windowed_layer import SinkWindowLayer


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FORMS)
def test_it_declares_how_it_is_tested(name: str):
    assert "exact" in FORMS[name], f'{name}: add the class attribute examples = {{"exact": "{name}(...)"}}'


@pytest.mark.parametrize(("name", "family"), LARGE)
def test_a_budget_that_nothing_exceeds_changes_no_bit(name: str, family: str):
    lm, x = model(family), ids(2, 14)
    lm.set_attn_implementation("sdpa")
    whole, stock = lm(x).logits, feed(lm, None, x, [14])
    cache = large(name, lm).cache(lm)
    assert torch.equal(feed(lm, cache, x, [14]), whole) and torch.equal(whole, stock)
    pieces = [6, 3, 1, 1, 1, 2]
    lm.set_attn_implementation("sdpa")
    expected = feed(lm, DynamicCache(config=lm.config), x, pieces)
    found = feed(lm, large(name, lm).cache(lm), x, pieces)
    agree = torch.equal if large(name).exact else torch.allclose
    assert agree(found, expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_caches_work_as_before_once_a_model_knows_memories(name: str, family: str):
    if family != "llama" and (name not in ONE_BY_ONE or (name, family) in REFUSED):
        pytest.skip(f"{name} does not fit {family}")
    lm, x = model(family), ids(2, 9)
    lm.set_attn_implementation("sdpa")
    expected = lm.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    large(name, lm).cache(lm)
    assert torch.equal(lm.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


@pytest.mark.parametrize(
    ("name", "family"), [*((n, "llama") for n in SMALL), ("StreamingLLM", "gemma3"), ("H2O", "gpt_neox")]
)
def test_padded_rows_keep_and_say_what_they_do_alone(name: str, family: str):
    lm, rows = model(family), [ids(1, n, seed=n)[0] for n in (15, 9, 2)]
    x, mask = left_padded(rows)
    cache = small(name, lm).cache(lm)
    together = feed(lm, cache, x, [11, 1, 1, 1, 1], mask)
    for number, row in enumerate(rows):
        alone = small(name, lm).cache(lm)
        pads = x.shape[1] - len(row)
        pieces = [11 - pads] if pads < 11 else []
        pieces += [1] * (len(row) - sum(pieces))
        logits = feed(lm, alone, row[None], pieces)
        torch.testing.assert_close(together[number, pads:], logits[0], atol=1e-5, rtol=1e-5)
        assert kept(cache, number) == kept(alone)


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_a_batch_do_not_meet(name: str):
    lm, x = model(), ids(3, 14)
    cache = small(name, lm).cache(lm)
    together = feed(lm, cache, x, [10, 1, 1, 1, 1])
    for row in range(3):
        alone = small(name, lm).cache(lm)
        logits = feed(lm, alone, x[row : row + 1], [10, 1, 1, 1, 1])
        torch.testing.assert_close(together[row : row + 1], logits, atol=1e-5, rtol=1e-5)
        assert kept(cache, row) == kept(alone)


@pytest.mark.parametrize("name", EVICTING)
def test_evicting_a_token_equals_masking_it(name: str):
    """A full cache with the decoded slots, and a mask over the evicted tokens, gives the same logits."""
    lm, x = model(), ids(1, 13)
    cache = small(name, lm).cache(lm)
    feed(lm, cache, x[:, :12], [10, 1, 1])
    held = kept(cache) if name not in CODED else [[list(range(12))] * 2] * 3
    assert name not in CODED or max(map(len, kept(cache)[0])) < 12
    token = x[:, 12:]
    # The reference implementation: the same keys and values, the tokens of each head, and plain softmax attention.
    expected = _masked(lm, cache, held, token)
    torch.testing.assert_close(lm(token, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def _masked(lm, cache: KVCache, held: list[list[list[int]]], token: torch.Tensor) -> torch.Tensor:
    """Logits of a token with a stock cache that has the kept slots at their tokens' places, and a mask over the others."""
    seen = cache.get_seq_length()
    stock = DynamicCache(config=lm.config)
    allowed = []
    for number, (layer, heads) in enumerate(zip(cache.kept, held, strict=True)):
        if isinstance(layer, SinkWindowLayer):
            keys, values, position = layer.restored()
            rows = [(keys[:, h], values[:, h], position) for h in range(keys.shape[1])]
        else:
            assert isinstance(layer, KVStoreLayer)
            rows = [
                (table.keys[:, h], table.values[:, h], table.position[:, h])
                for table in layer.stored
                for h in range(table.keys.shape[1])
            ]
        keys = torch.zeros(1, len(rows), seen, rows[0][0].shape[-1])
        values = torch.zeros_like(keys)
        for head, (key, value, position) in enumerate(rows):
            real = position[0] >= 0
            keys[0, head, position[0][real].long()] = key[0][real]
            values[0, head, position[0][real].long()] = value[0][real]
        stock.update(keys, values, number)
        allowed.append(torch.stack([torch.tensor([t in head or t == seen for t in range(seen + 1)]) for head in heads]))
    handles = []
    for number, module in enumerate(lm.get_decoder().layers):
        groups = module.self_attn.num_key_value_groups
        mask = allowed[number].repeat_interleave(groups, 0)[None, :, None]
        handles.append(
            module.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    lm.set_attn_implementation("sdpa")
    try:
        return lm(token, past_key_values=stock).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", EVICTING)
def test_storage_really_falls(name: str):
    lm, x = model(), ids(2, 60)
    full, cache = large("PreallocatedCache").cache(lm), small(name, lm).cache(lm)
    feed(lm, full, x, [60])
    feed(lm, cache, x, [50] + [1] * 10)
    if "share" not in name:
        most = 18 if getattr(small(name), "prefill_only", False) else 8  # including the 10 tokens after the prompt
        sizes = [(sum(map(len, layer)), most * len(layer)) for layer in kept(cache)]
        if getattr(small(name), "second_run", None) is not None:  # whose layers may share a budget
            sizes = [(sum(held), sum(limit)) for held, limit in [zip(*sizes, strict=True)]]
        assert all(held <= limit for held, limit in sizes)
        if isinstance(small(name), BudgetedPolicy):  # in other methods heads share a budget
            assert all(len(head) <= most for layer in kept(cache) for head in layer)
    # A slot also contains its position and notes, and storage for 16 more slots is unused.
    assert cache.nbytes() < (0.75 if "share" in name else 0.5) * full.nbytes()
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", COMPUTING_LESS)
def test_work_really_falls(name: str):
    """A method that saves compute runs fewer prompt tokens in its layers, and `nbytes` counts its whole state."""
    lm, x, rows = model(), ids(2, 60), 0

    def count(_, args: tuple, __) -> None:
        nonlocal rows
        rows += args[0].shape[:2].numel()

    layers = lm.get_decoder().layers
    cache = small(name, lm).cache(lm)
    handles = [layer.mlp.register_forward_hook(count) for layer in layers]
    feed(lm, cache, x[:, :50], [50])
    for handle in handles:
        handle.remove()
    assert rows < 0.8 * 2 * 50 * len(layers)
    feed(lm, cache, x[:, 50:], [1] * 10)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state_storage(cache)}
    assert cache.nbytes() >= sum(held.values()) and cache.get_seq_length() == 60


def state_storage(cache: KVCache) -> list[torch.Tensor]:
    """All tensors in the declared state of the layers."""
    return [part for layer in cache.kept for part in tensors_in(state_of(layer))]


@pytest.mark.parametrize("name", SLOTS)
def test_the_order_of_slots_means_nothing(name: str):
    lm, x = model(), ids(2, 14)
    cache, shuffled = (small(name, lm).cache(lm) for _ in range(2))
    for one in (cache, shuffled):
        feed(lm, one, x[:, :12], [10, 1, 1])
    for layer in shuffled.kept:
        assert isinstance(layer, KVStoreLayer)
        for table in layer.tables:
            order = torch.randperm(table.used, generator=torch.Generator().manual_seed(0))
            table.keys[:], table.values[:] = table.keys[:, :, order].clone(), table.values[:, :, order].clone()
            table.position[:] = table.position[:, :, order].clone()
            for note in table.notes:
                table.note[note][:] = table.note[note][:, :, order].clone()
    a, b = feed(lm, cache, x[:, 12:], [1, 1]), feed(lm, shuffled, x[:, 12:], [1, 1])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert kept(cache) == kept(shuffled)


@pytest.mark.parametrize("name", FORMS)
def test_bf16_and_shortest_texts(name: str):
    lm = copy.deepcopy(model()).to(torch.bfloat16)
    cache = (small(name, lm) if name in SMALL else large(name, lm)).cache(lm)
    logits = feed(lm, cache, ids(1, 11), [1] * 11)
    assert logits.isfinite().all() and cache.get_seq_length() == 11


@pytest.mark.parametrize("name", [name for name in FORMS if name not in CODED])
def test_gradients_of_several_calls_equal_those_of_one(name: str):
    lm, x = model(), ids(2, 14)
    memory = large(name, lm)
    weight = lm.get_input_embeddings().weight

    def gradient(pieces: list[int]) -> torch.Tensor:
        with torch.enable_grad():
            logits = feed(lm, memory.cache(lm), x, pieces)
            return torch.autograd.grad(logits.square().sum(), weight)[0]

    torch.testing.assert_close(gradient([6, 1, 1, 6]), gradient([14]), atol=1e-4, rtol=1e-4)

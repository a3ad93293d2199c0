"""The views of a store show its storage after every operation, in every gradient mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import model

from pondera.cache import slot_layer
from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.slot_attention import AttentionObservation
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache


def store(tokens: int = 6) -> KVStore:
    """A store of two sequences and two heads, with some empty slots."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, tokens, 4).unbind(0)
    made = KVStore.like(keys, values, {"note": 0.5})
    made.append(keys, values, torch.arange(tokens).expand(2, -1))
    made.evict(torch.tensor([[[1], [2]], [[3], [0]]]))
    return made


def append(table: KVStore) -> None:
    new = torch.ones(len(table.keys), 2, 1, 4)
    table.append(new, new, torch.full((len(new), 1), 40))


def grow(table: KVStore) -> None:
    new = torch.ones(len(table.keys), 2, 50, 4)
    table.append(new, new, torch.arange(40, 90).expand(len(new), -1))


def keep(table: KVStore) -> None:
    slot_BGk = torch.arange(0, table.used, 2).expand(len(table.keys), 2, -1)
    table.keep(slot_BGk, torch.ones_like(slot_BGk, dtype=torch.bool))


def renumber(table: KVStore) -> None:
    keep_C = torch.arange(100) % 2 == 0
    number_C = torch.cat([keep_C.cumsum(0) - 1, torch.zeros(1, dtype=torch.long)]).to(torch.int32)
    table.renumber(keep_C, number_C)


CHANGES: dict[str, Callable[[KVStore], object]] = {
    "append": append,
    "grow": grow,
    "keep": keep,
    "renumber": renumber,
    "evict": lambda table: table.evict(torch.zeros(len(table.keys), 2, min(1, table.used), dtype=torch.long)),
    "crop": lambda table: table.truncate(4),
    "crop-all": lambda table: table.truncate(0),
    "select": lambda table: table.select(torch.tensor([1, 0, 1])),
}


def check(table: KVStore) -> None:
    """The views are the first `used` slots of the storage, and share its memory."""
    shown = {"keys": table.keys_BGSD, "values": table.values_BGSD, "position": table.position_BGS}
    pairs = [(getattr(table, name), storage) for name, storage in shown.items()]
    assert list(table.note) == list(table.notes)
    for view, storage in [*pairs, *((table.note[name], table.notes[name]) for name in table.notes)]:
        assert view.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
        assert view.shape == storage[:, :, : table.used].shape and view.stride() == storage.stride()
        assert torch.equal(view, storage[:, :, : table.used])
    assert torch.equal(table.real, table.position_BGS[:, :, : table.used] >= 0)


@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_the_views_show_the_storage_after_every_change(first: str, second: str):
    table = store()
    for change in (first, second):
        CHANGES[change](table)
        check(table)


def test_the_views_of_a_copy_and_of_single_heads_show_their_own_storage():
    table = store()
    copied, heads = copy.deepcopy(table), table.split_heads()
    for one in (copied, *heads):
        check(one)
        assert one.keys.untyped_storage().data_ptr() != table.keys.untyped_storage().data_ptr()
    assert [one.heads for one in (table, copied, *heads)] == [[0, 1], [0, 1], [0], [1]]
    assert [(one.part.start, one.part.stop) for one in heads] == [(0, 1), (1, 2)]
    copied.position.fill_(EMPTY)
    assert bool((table.position >= 0).any())


@pytest.mark.parametrize("method", [PreallocatedCache(exact=False), H2O(8)], ids=repr)
def test_a_sequence_that_began_without_gradients_continues_with_them(method: PreallocatedCache | H2O):
    """A view that was made without gradients cannot be used with gradients, so each call makes its own."""
    lm, x = copy.deepcopy(model()).requires_grad_(True), ids(1, 16)
    logits = []
    for enabled in (False, True):
        cache = method.cache(lm)
        with torch.no_grad():
            for piece in x[:, :14].split([12, 1, 1], dim=1):
                lm(piece, past_key_values=cache)
        with torch.set_grad_enabled(enabled):
            logits.append([lm(x[:, at : at + 1], past_key_values=cache).logits for at in range(14, 16)])
    for plain, tracked in zip(*logits, strict=True):
        torch.testing.assert_close(tracked.detach(), plain, atol=1e-5, rtol=1e-5)
    assert logits[1][-1].requires_grad


@pytest.mark.parametrize("method", [H2O(64), H2O(16)], ids=repr)
def test_the_scores_of_one_block_exist_at_a_time(method: H2O, monkeypatch: pytest.MonkeyPatch):
    """A long prompt is observed in blocks, because the scores of all its queries need memory quadratic in its length."""
    import weakref

    seen, alive = [], []
    observe = H2O.observe

    def watched(policy: H2O, layer: slot_layer.KVStoreLayer, table: KVStore, block: AttentionObservation) -> None:
        seen.append(weakref.ref(block.score_BGRTS))
        alive.append(sum(one() is not None for one in seen))
        observe(policy, layer, table, block)

    monkeypatch.setattr(slot_layer, "BLOCK", 256)
    monkeypatch.setattr(H2O, "observe", watched)
    lm, x = model(), ids(1, 60)
    cache = method.cache(lm)
    with torch.no_grad():
        lm(x[:, :30], past_key_values=cache)
        lm(x[:, 30:], past_key_values=cache)
    assert len(alive) > 8 and max(alive) <= 2

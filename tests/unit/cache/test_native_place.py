"""A token that the kernel stores is stored as by the operations of torch: in the same kind of slot, with the same numbers."""

from __future__ import annotations

import pytest
import torch

from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.native_place import place_natively
from pondera.kernels.build import library

pytestmark = pytest.mark.skipif(library("place") is None, reason="no compiler")


def store(batch: int, heads: int, tokens: int, dtype: torch.dtype, width: int = 5) -> KVStore:
    torch.manual_seed(tokens)
    keys, values = torch.randn(batch, heads, tokens, 4).to(dtype), torch.randn(batch, heads, tokens, width).to(dtype)
    made = KVStore.like(keys, values, {"note": 0.5})
    made.append(keys, values, torch.arange(tokens).expand(batch, -1))
    made.notes["note"].fill_(7)
    return made


def content(table: KVStore) -> dict[tuple[int, int, int], list[list[float]]]:
    """Key, value and note of every slot that is not empty, by batch row, head and position."""
    found = {}
    for b, g, s in (table.position != EMPTY).nonzero().tolist():
        rows = (table.keys[b, g, s], table.values[b, g, s], table.note["note"][b, g, s, None])
        found[b, g, int(table.position[b, g, s])] = [row.tolist() for row in rows]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 1), (2, 3, 70), (3, 2, 130)])
@pytest.mark.parametrize("holes", ["none", "every head", "some heads", "last slot"])
def test_a_token_is_stored_as_by_torch(dtype: torch.dtype, batch: int, heads: int, tokens: int, holes: str):
    ours, theirs = (store(batch, heads, tokens, dtype) for _ in range(2))
    slot_BG1 = torch.randint(tokens, (batch, heads, 1))
    if holes == "last slot":
        slot_BG1.fill_(tokens - 1)
    for table in (ours, theirs):
        if holes == "some heads" and batch * heads > 1:
            table.position[0, 0, 0] = EMPTY
            table.whole = False
        elif holes != "none":
            table.evict(slot_BG1)
    # A slice of wider rows: the new rows need not be contiguous.
    key, value = torch.randn(2, batch, heads, 3, 5).to(dtype).unbind(0)
    key, value = key[:, :, 1:2, :4], value[:, :, 1:2]
    for number in (tokens, tokens + 1, tokens + 2):
        ours.append(key, value, number)
        theirs.append(key, value, torch.full((batch, 1), number))
        assert ours.used == theirs.used
        assert content(ours) == content(theirs)


def test_without_room_nothing_is_stored():
    table = store(1, 2, 16, torch.float32)
    full = tuple(rows[:, :, :16].contiguous() for rows in (table.keys_BGSD, table.values_BGSD, table.position_BGS))
    before = [rows.clone() for rows in full]
    assert place_natively(full, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 5), 16, 16, True) == -1
    assert all(map(torch.equal, before, full))


@pytest.mark.parametrize("why", ["dtype", "gradient", "step"])
def test_what_the_kernel_cannot_copy_is_left_to_torch(why: str):
    table = store(1, 2, 16, torch.float32)
    key, value = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 5)
    if why == "dtype":
        key = key.double()
    elif why == "gradient":
        key.requires_grad_()
    else:
        key = torch.ones(1, 2, 1, 8)[..., ::2]
    storage = (table.keys_BGSD, table.values_BGSD, table.position_BGS)
    assert place_natively(storage, key, value, 16, 16, False) is None

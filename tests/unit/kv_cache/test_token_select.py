"""TokenSelect attends to the tokens that the heads vote for."""

from __future__ import annotations

import torch
from helpers.architectures import ids
from helpers.policy_reference import model, run

from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.token_select import TokenSelect, vote


def choices(memory: TokenSelect, x: torch.Tensor, pieces: list[int]) -> list[list[int]]:
    """The tokens attended to by the first layer in each call; none: all."""
    found, select = [], memory.select_kv

    def noted(layer, table, query, call):
        slot = select(layer, table, query, call)
        if layer.index == 0:
            found.append([] if slot is None else sorted(slot[0, 0][slot[0, 0] >= 0].tolist()))
        return slot

    memory.select_kv = noted
    run(memory, x, pieces)
    return found


def test_a_vote_is_one_per_head_and_the_choice_is_that_of_plain_loops():
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 2, 3, 4, generator=draw), torch.randn(1, 2, 20, 4, generator=draw)
    free = torch.ones(1, 20, dtype=torch.bool)
    free[..., :3] = False
    found = vote(query, keys, free, scaling=0.5)[0]
    expected = [0.0] * 20
    for head in range(2):
        for r in range(3):
            products = [0.5 * float(query[0, head, r] @ keys[0, head, s]) for s in range(3, 20)]
            for s, share in enumerate(torch.tensor(products).softmax(0).tolist()):
                expected[s + 3] += share
    torch.testing.assert_close(found, torch.tensor(expected))
    assert abs(float(found.sum()) - 6) < 1e-5


def test_first_and_latest_tokens_and_those_of_the_call_are_always_seen():
    seen = choices(TokenSelect(5, sinks=2, recent=3, reuse=2.0), ids(1, 40), [20, 10, *[1] * 10])
    assert seen[0] == []  # its own tokens are always seen
    assert len(seen[1]) == 2 + 5 + 3 + 10 and {0, 1, *range(17, 30)} <= set(seen[1])
    for token, one in enumerate(seen[2:], start=30):
        assert len(one) == 11 and {0, 1, *range(token - 3, token + 1)} <= set(one)


def test_a_choice_is_used_again_while_the_query_is_alike():
    x, chosen = ids(1, 40), []
    for reuse in (-1.0, 2.0):
        seen = choices(TokenSelect(5, sinks=0, recent=2, reuse=reuse), x, [30, *[1] * 10])
        middle = [tuple(t for t in one if t < token - 2) for token, one in enumerate(seen[1:], start=30)]
        chosen.append(len(set(middle)))
    assert chosen[0] == 1 and chosen[1] > 1, chosen


def test_drafts_do_not_change_what_was_chosen():
    lm, x = model(), ids(1, 40)
    cache = TokenSelect(5, sinks=0, recent=2, reuse=-1.0).cache(lm)
    lm(x[:, :30], past_key_values=cache)
    lm(x[:, 30:31], past_key_values=cache)
    layer = cache.kept[0]
    assert isinstance(layer, KVStoreLayer)
    before = layer.tables[0].note["chosen"].clone()
    cache.activate_past_recording()
    lm(x[:, 31:34], past_key_values=cache)
    cache.crop(-3)
    assert before.sum() == 2 * 5 and torch.equal(layer.tables[0].note["chosen"], before)

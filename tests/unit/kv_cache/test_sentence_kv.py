"""SentenceKV attends to the sentences whose mean keys fit the current sentence, compared with plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import saved_models
from helpers.architectures import BACKBONES, ids, left_padded
from helpers.policy_reference import kept, model, run

from pondera import H2O, KVzip, PreallocatedCache, SnapKV, TokenSelect, UserError
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.common.marked_tokens import among
from pondera.methods.kv_cache.sentence_kv import SentenceKV
from pondera.models.adaptive_lm import AdaptiveLM
from pondera.models.config import AdaptiveConfig

ENDS = [3, 17, 40, 60, 77, 90]


def method(**more: Any) -> SentenceKV:
    """Over a whole prompt, so that the tests need not know what a policy evicts."""
    given = {"attended": 14, "ends": ENDS, "sinks": 2, "recent": 3, "longest": 9} | more
    return SentenceKV(given.pop("policy", PreallocatedCache()), **given)


Seen = tuple[torch.Tensor, torch.Tensor, list[list[int]]]


def watched(memory: SentenceKV, x: torch.Tensor, pieces: list[int]) -> list[Seen]:
    """Of each call in the second layer: queries ``[G, R, T, D]``, keys ``[G, S, D]``, and the tokens each head attends to."""
    found, select = [], memory.select_kv

    def noted(layer: KVStoreLayer, table: Any, query: torch.Tensor, call: Any) -> torch.Tensor | None:
        slots = select(layer, table, query, call)
        if layer.index == 1:
            heads = (
                [[*range(table.used)]] * 2 if slots is None else [sorted(head[head >= 0].tolist()) for head in slots[0]]
            )
            found.append((query[0].clone(), table.keys[0].clone(), heads))
        return slots

    vars(memory)["select_kv"] = noted
    run(memory, x, pieces)
    return found


def sentences(tokens: list[int], longest: int) -> list[list[int]]:
    """The tokens of each sentence; the last one is not complete, and may be empty."""
    found: list[list[int]] = [[]]
    for number, token in enumerate(tokens):
        found[-1].append(number)
        if token in ENDS or len(found[-1]) == longest:
            found.append([])
    return found


def reference(
    memory: SentenceKV, tokens: list[int], keys: torch.Tensor, queries: list[torch.Tensor]
) -> list[list[int]]:
    """What a step attends to.

    Args:
        tokens: all tokens, the new one last.
        keys: ``[G, S, D]``.
        queries: ``[G, R, D]`` of each generated token, the new one last.
    """
    *complete, open_one = sentences(tokens, memory.longest)
    here = queries[-min(len(open_one), len(queries)) :] if open_one else []
    if len(here) <= memory.dense:
        return [[*range(len(tokens))]] * len(keys)
    found = []
    for head, keys_SD in enumerate(keys):
        query = torch.stack([each[head].sum(0) for each in here]).mean(0)
        score = {number: float(keys_SD[part].mean(0) @ query) for number, part in enumerate(complete)}
        last = len(tokens) - 1
        taken = {t for t in range(len(tokens)) if t < memory.sinks or t >= last - memory.recent} | set(open_one)
        for number in sorted(score, key=score.__getitem__, reverse=True):
            for token in reversed(complete[number]):
                if len(taken) < memory.attended:
                    taken.add(token)
        found.append(sorted(taken))
    return found


@pytest.mark.parametrize(
    "more", [{}, {"longest": 1}, {"dense": 3}, {"longest": 40}, {"attended": 9, "recent": 0, "sinks": 0}]
)
def test_each_step_attends_to_what_plain_loops_select(more: dict[str, Any]):
    x, memory = ids(1, 70, seed=4), method(**more)
    seen = watched(memory, x, [45, *[1] * 25])
    queries, sparse = [], 0
    for number, (query, keys, heads) in enumerate(seen[1:], start=46):
        queries.append(query[:, :, 0])
        assert heads == reference(memory, x[0, :number].tolist(), keys, queries), number
        sparse += len(heads[0]) < number
    assert sparse > 8 or memory.longest == 1  # whose sentences are all at their end


def test_a_sentence_of_one_token_each_ranks_single_tokens():
    x = ids(1, 60, seed=4)
    (_, _, _), (query, keys, heads) = watched(method(longest=1, dense=0), x, [45, 3])
    always = {0, 1, *range(42, 48)}
    for keys_SD, query_RTD, head in zip(keys, query, heads, strict=True):
        score = (keys_SD[:45] @ query_RTD.sum(0).mean(0)).tolist()
        best = sorted((t for t in range(45) if t not in always), key=lambda t: score[t], reverse=True)
        assert head == sorted(always | set(best[: 14 + 2 - len(always)]))


def test_a_question_of_several_tokens_attends_to_its_own_tokens_too():
    x = ids(1, 60, seed=4)
    seen = watched(method(), x, [45, 12])
    for head in seen[1][2]:
        assert len(head) == 14 + 11 and {0, 1, *range(42, 57)} <= set(head)


def test_a_context_without_ends_is_attended_to_in_full():
    x = torch.full((1, 50), 1)
    assert all(heads == [[*range(len(heads[0]))]] * 2 for *_, heads in watched(method(longest=100), x, [40, *[1] * 10]))


def test_the_policy_decides_what_is_kept():
    x, pieces = ids(1, 60), [50, *[1] * 10]
    expected = kept(run(SnapKV(20, window=4), x, [50]))
    found = run(method(policy=SnapKV(20, window=4)), x, pieces)
    assert [[[t for t in head if t < 50] for head in layer] for layer in kept(found)] == expected
    means = [layer.state["means 0"] for layer in found.kept if isinstance(layer, KVStoreLayer)]
    assert all(each.shape[2] < 20 for each in means)


def test_means_are_those_of_the_kept_keys_of_complete_sentences():
    x = ids(1, 60)
    cache = run(method(policy=SnapKV(20, window=4)), x, [50, *[1] * 10])
    *complete, _ = sentences(x[0].tolist(), 9)
    for layer in cache.kept:
        assert isinstance(layer, KVStoreLayer)
        (table,) = layer.tables
        for head, found in enumerate(layer.state["means 0"][0]):
            at = {int(p): slot for slot, p in enumerate(table.position[0, head]) if p >= 0}
            for part, mean in zip(complete, found, strict=True):
                keys = [table.keys[0, head, at[t]] for t in part if t in at]
                expected = torch.stack(keys).mean(0) if keys else torch.zeros_like(mean)
                torch.testing.assert_close(mean, expected)


def test_rows_of_a_padded_batch_attend_to_what_they_do_alone():
    lm, memory = model(), method()
    rows = [ids(1, n, seed=n)[0] for n in (60, 37)]
    x, mask = left_padded(rows)
    found = {}
    for name, given, real in (("together", x, mask), ("alone", rows[1][None], torch.ones(1, 37))):
        cache, T, logits = memory.cache(lm), given.shape[1], []
        position = (real.cumsum(-1) - 1).clamp(min=0).long()
        for begin, end in [(0, T - 12), *((t, t + 1) for t in range(T - 12, T))]:
            call = {"attention_mask": real[:, :end], "position_ids": position[:, begin:end], "past_key_values": cache}
            logits.append(lm(given[:, begin:end], **call).logits[-1])
        found[name] = torch.cat(logits)[-12:]
    torch.testing.assert_close(found["together"], found["alone"], atol=1e-5, rtol=1e-5)


def test_tokens_are_found_by_their_ids_and_by_their_embeddings():
    decoder, x = model().get_decoder(), ids(2, 30)
    expected = torch.tensor([[token in ENDS for token in row] for row in x.tolist()])
    assert torch.equal(among(decoder, x, ENDS), expected)
    assert torch.equal(among(decoder, decoder.get_input_embeddings()(x), ENDS), expected)
    assert expected.any() and not expected.all()


def test_a_model_that_embeds_its_tokens_itself_decodes_the_same():
    torch.manual_seed(0)
    config = AdaptiveConfig(backbone=copy.deepcopy(BACKBONES["llama"]), kv_cache=repr(method()))
    lm: Any = AdaptiveLM(config).eval()
    x, found = ids(1, 60), []
    for each in (lm, lm.backbone.lm):
        cache = lm.kv_cache.cache(lm.backbone.lm)
        with torch.no_grad():
            pieces = x.split([45, *[1] * 15], dim=1)
            found.append(torch.cat([each(piece, past_key_values=cache).logits for piece in pieces], dim=1))
    assert torch.equal(*found)


def test_ends_of_a_tokenizer():
    tokenizer = saved_models.tokenizer()
    ends = SentenceKV.ends_of(tokenizer)
    texts = {str(tokenizer.decode([token])) for token in ends}
    assert {".", "!", "?"} <= texts and not texts & {",", "a", " ", "\n", "-"}
    for text in ("It is. ", 'He said "no!"', "Why?"):
        assert any(token in ends for token in tokenizer(text).input_ids), text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"ends": None}, "ends=None: give the ids .*ends_of"),
        ({"ends": []}, r"ends=\[\]"),
        ({"ends": ["."]}, "give the ids"),
        ({"attended": 5}, "attended=5, sinks=2, recent=3"),
        ({"longest": 0}, "longest=0"),
        ({"dense": -1}, "dense=-1"),
        ({"policy": TokenSelect(8)}, r"policy=TokenSelect\("),
        ({"policy": KVzip(0.5)}, r"policy=KVzip\("),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], reason: str):
    with pytest.raises(UserError, match=reason):
        method(**arguments)


def test_what_it_saves_is_what_its_policy_saves():
    assert (method().saves, method(policy=H2O(20)).saves) == ("reading", "bytes")


def test_a_decoder_that_gets_its_cache_in_another_way_is_refused():
    lm = model()
    decoder, cache = lm.get_decoder(), method().cache(lm)
    hooks = dict(decoder._forward_pre_hooks)
    decoder._forward_pre_hooks.clear()
    try:
        with pytest.raises(UserError, match="without passing its cache by name"):
            lm(ids(1, 5), past_key_values=cache)
    finally:
        decoder._forward_pre_hooks.update(hooks)

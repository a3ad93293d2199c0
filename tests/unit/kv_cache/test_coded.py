"""Coded: codes of what an eviction method keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ids
from helpers.cache_methods import feed, kept, model

from pondera import UserError
from pondera.cost.measure import live_cache_bytes
from pondera.methods.kv_cache.coded import Coded, CodedLayer
from pondera.methods.kv_cache.fast_kv import FastKV
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.kivi import KIVI
from pondera.methods.kv_cache.kv_zip import KVzip
from pondera.methods.kv_cache.snap_kv import SnapKV
from pondera.methods.kv_cache.turbo_quant import TurboQuant
from pondera.methods.kv_cache.vqkv import VQKV

CODE = {"group": 4, "window": 4, "sinks": 1}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("policy", [SnapKV(24, window=4), KVzip(24), KVzip(24, level="head")])
def test_it_keeps_what_the_policy_keeps(policy):
    lm, x = model(), ids(2, 60)
    exact, coded = policy.cache(lm), Coded(policy, KIVI(8, **CODE)).cache(lm)
    expected, found = (feed(lm, cache, x, [50] + [1] * 10) for cache in (exact, coded))
    assert all(isinstance(layer, CodedLayer) and layer.coded for layer in coded.kept)
    for row in range(2):
        assert kept(coded, row) == kept(exact, row)
    error = (found[:, 50:] - expected[:, 50:]).norm() / expected[:, 50:].norm()
    assert 0 < error < 0.02  # 8 bits per number are nearly exact


def test_the_shares_multiply():
    """Half of 100 slots in 12 of 32 bits each, beside exact ones: 4 latest, a sink, and up to 3 of a part of a unit."""
    lm, x, policy = model(), ids(1, 100), KVzip(0.5, level="head", chunk=20)
    exact, coded = (method.cache(lm) for method in (policy, Coded(policy, KIVI(4, **CODE))))
    for cache in (exact, coded):
        lm(x, past_key_values=cache)
    slots = 3 * 2 * 2 * 16 * 4  # layers, heads, keys and values, width, bytes
    most = 3 * 2 * 50 * 4 + 42 * slots * (4 + 32 / 4) / 32 + 8 * slots  # positions, codes with steps, exact slots
    assert live_cache_bytes(coded) <= most < 0.6 * live_cache_bytes(exact)


def test_sinks_and_latest_tokens_stay_exact():
    lm, x = model(), ids(1, 60)
    cache = Coded(SnapKV(24, window=8), KIVI(2, **CODE)).cache(lm)
    lm(x, past_key_values=cache)
    for layer in cache.kept:
        for table, coded in zip(layer.tables, layer.coded, strict=True):
            for head, codes in zip(table.position[0], coded.position_BGS[0], strict=True):
                exact, in_codes = set(head[head >= 0].tolist()), set(codes[codes >= 0].tolist())
                assert {56, 57, 58, 59} <= exact and not exact & in_codes
                assert 0 not in in_codes and len(in_codes) % 4 == 0 and len(in_codes) >= 16


def test_questions_are_asked_and_rolled_back():
    lm, context, question = model(), ids(1, 60), ids(1, 7, seed=5)
    cache = Coded(KVzip(0.5), KIVI(4, **CODE)).cache(lm)
    lm(context, past_key_values=cache)
    found = []
    for _ in range(2):
        cache.activate_past_recording()
        found.append(lm(question, past_key_values=cache).logits)
        cache.crop(-7)
    torch.testing.assert_close(found[0], found[1])
    assert cache.get_seq_length() == 60
    with pytest.raises(UserError, match="cannot roll back"):
        cache.crop(-1)


def test_a_prompt_within_the_window_stays_exact_until_the_next_prompt():
    lm, x = model(), ids(1, 60)
    cache = Coded(SnapKV(48, window=4), KIVI(4, group=4, window=24)).cache(lm)
    lm(x[:, :20], past_key_values=cache)
    assert not any(layer.coded for layer in cache.kept)
    lm(x[:, 20:], past_key_values=cache)
    assert all(layer.coded for layer in cache.kept)


def test_codes_of_rotated_vectors():
    lm, x = model(), ids(1, 60)
    exact, coded = SnapKV(24, window=4).cache(lm), Coded(SnapKV(24, window=4), TurboQuant(4, window=4)).cache(lm)
    expected, found = (feed(lm, cache, x, [50] + [1] * 10)[:, 50:] for cache in (exact, coded))
    assert 0 < (found - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize(
    "policy, code, message",
    [
        (H2O(8), None, "at the end of the prompt"),
        (FastKV(SnapKV(8, window=4)), None, "at the end of the prompt"),
        (KIVI(4), None, "at the end of the prompt"),
        (None, H2O(8), "stores codes"),
    ],
)
def test_methods_that_cannot_be_combined(policy, code, message: str):
    with pytest.raises(UserError, match=message):
        Coded(policy, code)


def test_codes_with_tables_are_refused():
    code = VQKV(2, codes=4, vectors=64, fitting="kmeans", window=5, sinks=1, flush_size=2)
    lm = model()
    with pytest.raises(UserError, match="KIVI"):
        Coded(KVzip(0.5), code.fit(lm, [ids(4, 20)])).cache(lm)
    with pytest.raises(UserError, match=r"code=VQKV.*tables are fitted.*give KIVI\(4\) or TurboQuant\(4\)"):
        Coded(KVzip(0.5), VQKV(2))

"""The benchmark beside kvpress: an answer is scored after a compressed cache as after the text, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import scripts
from helpers.architectures import ids
from helpers.policy_reference import model

from pondera.core import spec
from pondera.core.hf import DynamicCache

BENCHMARK: Any = scripts.load("kvpress_questions", "benchmarks")


@torch.no_grad()
def test_a_question_leaves_no_trace_and_its_answer_is_scored():
    lm, context, cache = model(), ids(1, 40), DynamicCache()
    lm(context, past_key_values=cache)
    found = [BENCHMARK.answered(lm, cache, 40, [5, 6, 7], [8, 9]) for _ in range(2)]
    logits = lm(context.new_tensor([[*context[0].tolist(), 5, 6, 7, 8, 9]])).logits[0].log_softmax(-1)
    assert found[0] == found[1] and found[0][0] == pytest.approx(float(logits[42, 8] + logits[43, 9]), abs=1e-3)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_positions_are_those_after_the_whole_context():
    """A cache from which tokens were removed, as a press does."""
    lm, context, cache = model(), ids(1, 40), DynamicCache()
    lm(context, past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 8:], layer.values[:, :, 8:]
    answer = BENCHMARK.answered(lm, cache, 40, [5, 6, 7], [8, 9])[0]
    assert answer != pytest.approx(BENCHMARK.answered(lm, cache, 32, [5, 6, 7], [8, 9])[0], abs=1e-4)


def test_the_methods_beside_each_press_exist():
    found = BENCHMARK.pairs()
    assert found["KVzipPress(compression_ratio=0.875)"] == "KVzip(0.125)" and len(found) == len(BENCHMARK.PAIRS) + 1
    for text in found.values():
        spec.build(text, "kv_cache")
    for text in BENCHMARK.OURS:
        spec.build(text, "kv_cache")

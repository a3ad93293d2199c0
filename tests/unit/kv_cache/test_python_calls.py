"""How many Python functions of Pondera a decode step calls: a count, which does not depend on the machine as times do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import scripts

from pondera.core import spec
from pondera.kernels.build import library

CALLS: Any = scripts.load("python_calls", "benchmarks")
# Two layers, one sequence without padding; every step of an eviction policy evicts. Calls of kernels, which replace a dozen
# operations of torch each, need some Python functions of their own.
MOST = {
    "H2O(24)": 117,
    "A2SF(24)": 109,
    "StreamingLLM(24)": 89,
    "SnapKV(24, window=4)": 73,
    "PreallocatedCache()": 69,
    "KIVI(2, group=4, window=4, sinks=1)": 81,
    "VQKV(2, window=5, sinks=1, flush_size=2, codes=4, vectors=64, fitting='kmeans', branches=1)": 139,
}


pytestmark = pytest.mark.skipif(library("attention") is None, reason="counted with native kernels")


@pytest.mark.parametrize("method", MOST)
def test_a_decode_step_calls_few_python_functions(method: str):
    calls = CALLS.calls_of_step(spec.build(method, "kv_cache"))
    assert calls.total() <= MOST[method], "\n".join(f"{count} {name}" for name, count in sorted(calls.items()))


def test_every_counted_step_of_h2o_evicts_in_both_layers():
    calls = CALLS.calls_of_step(spec.build("H2O(24)", "kv_cache"))
    assert calls["cache/native_evict.py: evict_natively"] == 2


def test_the_counter_counts_calls_of_the_package_only():
    count = CALLS.calls_of(lambda: [spec.build("H2O(24)", "kv_cache") for _ in range(3)])
    assert count["methods/kv_cache/h2o.py: H2O.__init__"] == 3
    assert not any("torch" in name for name in count)
    assert not CALLS.calls_of(lambda: torch.nn.Linear(2, 2))

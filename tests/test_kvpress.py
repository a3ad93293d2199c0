"""Which tokens kvpress keeps: how kept sets are compared, and what the committed comparison says."""

from __future__ import annotations

import json
from typing import Any

from helpers import scripts

PEER: Any = scripts.load("kvpress_agreement", "benchmarks")


def test_kept_sets_are_compared_one_by_one():
    whole = [[[0, 1, 2, 3]] * 2]
    mine = {f"{name} {share} {seed}": whole for name in PEER.PAIRS for share in PEER.SHARES for seed in PEER.SEEDS}
    other = mine | {f"SnapKV 0.5 {PEER.SEEDS[0]}": [[[0, 1, 2, 3], [0, 1, 2, 4]]]}
    found = {(row["policy"], row["share"]): row for row in PEER.compare(mine, other)}
    sets = 2 * len(PEER.SEEDS)
    apart = found.pop(("SnapKV", 0.5))
    assert (apart["sets"], apart["same"], apart["overlap"]) == (sets, sets - 1, 1 - 1 / (4 * sets))
    assert all(row["same"] == sets and row["overlap"] == 1 for row in found.values())


def test_the_published_comparison_is_of_these_policies_and_says_that_they_agree():
    rows = json.loads((scripts.ROOT / "results/kvpress.json").read_text())["rows"]
    assert [(row["policy"], row["share"]) for row in rows] == [(name, s) for name in PEER.PAIRS for s in PEER.SHARES]
    assert all(row["same"] == row["sets"] for row in rows), "docs/results/eviction.md has to say which, and why"

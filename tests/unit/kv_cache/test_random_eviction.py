"""RandomEviction: chance that follows from where a token stands."""

from __future__ import annotations

from helpers.architectures import ids
from helpers.policy_reference import kept, run

from pondera.methods.kv_cache.random_eviction import RandomEviction


def test_what_is_kept_follows_from_seed_layer_and_place_alone():
    whole, pieces = (
        kept(run(RandomEviction(10, recent=2), ids(1, 40, seed=s), p)) for s, p in ((1, [40]), (2, [20] * 2))
    )
    assert whole == pieces and whole[0][0] == whole[0][1] and whole[0] != whole[1]
    assert whole != kept(run(RandomEviction(10, recent=2, seed=1), ids(1, 40), [40]))


def test_every_place_is_kept_as_often():
    found = [
        t for seed in range(40) for t in kept(run(RandomEviction(11, recent=1, seed=seed), ids(1, 41), [41]))[0][0]
    ]
    counts = [found.count(t) for t in range(40)]
    assert found.count(40) == 40 and sum(counts) == 400 and max(counts) < 25, counts

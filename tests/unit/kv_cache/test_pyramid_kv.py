"""PyramidKV: budgets that fall over the layers."""

from __future__ import annotations

import pytest
from helpers.architectures import ids
from helpers.policy_reference import kept, run

from pondera import UserError
from pondera.core import spec
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.kv_zip import KVzip
from pondera.methods.kv_cache.pyramid_kv import FallingBudget, PyramidKV
from pondera.methods.kv_cache.snap_kv import SnapKV


def test_budgets_lie_on_a_line_whose_mean_is_the_budget():
    found = [FallingBudget(512, least=32, beta=20).slots(layer, [0], 0, 1, 9)[0] for layer in range(9)]
    assert found == [968 - 114 * layer for layer in range(9)] and sum(found) == 9 * 512
    assert [FallingBudget(512, least=32, beta=1).slots(n, [0], 0, 1, 9)[0] for n in range(9)] == [512] * 9
    assert FallingBudget(512, least=32).slots(0, [0, 1], 0, 1, 1) == [512, 512]


def test_no_layer_gets_more_than_all_tokens():
    found = [FallingBudget(0.75, least=20, beta=20).slots(layer, [0], 100, 1, 3)[0] for layer in range(3)]
    assert found == [100, 75, 50]
    assert [FallingBudget(1.0, least=20).slots(layer, [0], 100, 1, 3)[0] for layer in range(3)] == [100] * 3


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("PyramidKV(SnapKV(12, window=4), beta=4)", [[18, 18], [6, 6]]),
        ("PyramidKV(AdaKV(SnapKV(12, window=4)), beta=4)", [36, 12]),
        ("PyramidKV(H2O(10, recent=2), beta=8)", [[17, 17], [3, 3]]),
    ],
)
def test_layers_keep_their_budgets_by_the_scores_of_the_policy(text: str, sizes: list):
    x = ids(1, 40)
    found = kept(run(spec.build(text, "kv_cache"), x, [40]))
    assert [
        sum(map(len, layer)) if isinstance(size, int) else [*map(len, layer)]
        for layer, size in zip(found, sizes, strict=True)
    ] == sizes
    if "H2O" not in text:
        inner = text.removeprefix("PyramidKV(").rpartition(", beta")[0]
        for number, slots in enumerate((18, 6)):
            assert found[number] == kept(run(spec.build(inner.replace("12", str(slots)), "kv_cache"), x, [40]))[number]


def test_the_wrapped_policy_and_its_name_stay_as_they_are():
    policy = SnapKV(12, window=4)
    made = PyramidKV(policy, beta=4)
    assert not isinstance(policy.budget, FallingBudget) and repr(made) == "PyramidKV(SnapKV(12, window=4), beta=4)"
    assert [len(layer[0]) for layer in kept(run(policy, ids(1, 40), [40]))] == [12, 12]


def test_what_does_not_fit_is_refused_in_words():
    for policy in (SnapKV([40, 50], window=4), KVzip(), PyramidKV(H2O(8))):
        with pytest.raises(UserError, match="one budget for all layers"):
            PyramidKV(policy)
    with pytest.raises(UserError, match="1 or more"):
        PyramidKV(beta=0.5)

"""A2SF between H2O and the latest row."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import best, kept, run, weights

from pondera import UserError
from pondera.methods.kv_cache.a2sf import A2SF
from pondera.methods.kv_cache.h2o import H2O


def test_with_alpha_1_it_is_h2o():
    x = ids(2, 40)
    a, b = (run(policy, x, [24, *[1] * 16]) for policy in (A2SF(10, alpha=1.0), H2O(10)))
    for ours, theirs in zip(a.kept, b.kept, strict=True):
        for one, other in zip(ours.tables, theirs.tables, strict=True):
            assert torch.equal(one.position, other.position)
            # A kernel sums the weights of H2O, which rounds differently.
            torch.testing.assert_close(one.note["received"], other.note["received"], rtol=1e-5, atol=1e-6)


def test_with_alpha_0_the_latest_row_decides():
    x = ids(1, 30)
    for layer, heads in zip(weights(x), kept(run(A2SF(9, alpha=0.0, recent=2), x, [30])), strict=True):
        for head, found in zip(layer, heads, strict=True):
            assert found == best([sum(r[-1][key] for r in head) for key in range(30)], 9, {28, 29})


@pytest.mark.parametrize("pieces", [[20], [7, 6, 7], [1] * 20])
def test_the_recursion_is_the_closed_form_and_conserves_attention(pieces: list[int]):
    x, alpha = ids(1, 20), 0.8
    cache = run(A2SF(64, alpha=alpha), x, pieces)
    for layer, weight in zip(cache.kept, weights(x), strict=True):
        for head in range(2):
            note_S = layer.tables[0].note["received"][0, head]
            closed = [sum(alpha ** (19 - i) * r[i][j] for r in weight[head] for i in range(20)) for j in range(20)]
            torch.testing.assert_close(note_S, torch.tensor(closed), atol=1e-5, rtol=1e-5)
            assert float(note_S.sum()) == pytest.approx(2 * (1 - alpha**20) / (1 - alpha), rel=1e-5)


def test_a_factor_above_1_is_refused_in_words():
    with pytest.raises(UserError, match="from 0 to 1"):
        A2SF(9, alpha=1.5)

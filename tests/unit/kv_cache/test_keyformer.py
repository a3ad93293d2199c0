"""Keyformer: H2O without its noise; noise that follows from where it is drawn."""

from __future__ import annotations

import torch
from helpers.architectures import ids
from helpers.policy_reference import Watch, kept, model, run

from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.keyformer import Keyformer


def test_without_noise_and_at_temperature_1_it_is_h2o():
    x = ids(2, 40)
    a = run(Keyformer(10, recent=0.5, noise=0.0, tau_step=0.0), x, [24, *[1] * 16])
    b = run(H2O(10), x, [24, *[1] * 16])
    for ours, theirs in zip(a.kept, b.kept, strict=True):
        for one, other in zip(ours.tables, theirs.tables, strict=True):
            assert torch.equal(one.position, other.position)
            # A kernel sums the weights of H2O, which rounds differently.
            torch.testing.assert_close(one.note["received"], other.note["received"], rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_noisy_logits_and_conserve_attention():
    x = ids(1, 12)
    cache, watch, lm = run(Keyformer(64, tau=2.0, seed=3), x, [12]), Watch(), model()
    lm(x, past_key_values=watch.cache(lm))
    for layer in cache.kept:
        table, seen = layer.tables[0], watch.seen[layer.index]
        noise = Keyformer(64, seed=3).gumbel(layer, table, seen)
        expected = torch.zeros(2, 12)
        for head in range(2):
            for r in range(2):
                for i in range(12):
                    logits = [seen.score_BGRTS[0, head, r, i, j] + noise[0, head, r, i, j] for j in range(i + 1)]
                    expected[head, : i + 1] += torch.softmax(torch.stack(logits) / 2.0, 0).float()
        torch.testing.assert_close(table.note["received"][0], expected, atol=1e-5, rtol=1e-5)
        assert table.note["received"].sum().allclose(torch.tensor(2.0 * 2 * 12))


def test_noise_is_gumbel_and_differs_by_seed_layer_head_query_and_key():
    x, watch, lm = ids(1, 40), Watch(), model()
    cache = watch.cache(lm)
    lm(x, past_key_values=cache)
    one, two = cache.kept
    noise, others = (
        [Keyformer(64, seed=seed).gumbel(layer, layer.tables[0], watch.seen[layer.index]) for layer in (one, two)]
        for seed in (0, 1)
    )
    assert abs(float(noise[0].mean()) - 0.5772) < 0.03 and abs(float(noise[0].std()) - 1.2825) < 0.03
    assert len(noise[0].unique()) == noise[0].numel()
    assert not torch.isclose(noise[0], noise[1]).any() and not torch.isclose(noise[0], others[0]).any()


def test_pieces_of_a_prompt_change_nothing_and_the_seed_something():
    x = ids(1, 30)
    whole, pieces = (run(Keyformer(64), x, one) for one in ([30], [11, 19]))
    for a, b in zip(whole.kept, pieces.kept, strict=True):
        torch.testing.assert_close(a.tables[0].note["received"], b.tables[0].note["received"], atol=1e-5, rtol=1e-5)
    assert kept(run(Keyformer(8), x, [30])) == kept(run(Keyformer(8), x, [30]))
    assert kept(run(Keyformer(8), x, [30])) != kept(run(Keyformer(8, seed=1), x, [30]))


def test_a_share_is_of_the_prompt():
    assert all(len(head) == 10 for layer in kept(run(Keyformer(0.5), ids(1, 40), [20, *[1] * 20])) for head in layer)

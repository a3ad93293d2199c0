"""DapQ: SnapKV whose queries stand where the answer will."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.policy_reference import Watch, best, kept, model, run
from transformers import AutoConfig, AutoModelForCausalLM

from pondera import UserError
from pondera.methods.kv_cache.ada_kv import AdaKV
from pondera.methods.kv_cache.dap_q import DapQ
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.snap_kv import SnapKV
from pondera.models.rotary import rotary_frequencies, rotate_by_position


def test_moved_by_nothing_it_is_the_policy():
    x = ids(2, 50)
    a, b = (run(policy, x, [40, *[1] * 10]) for policy in (DapQ(SnapKV(12, window=4), ahead=0), SnapKV(12, window=4)))
    assert kept(a) == kept(b) and kept(a) != kept(run(DapQ(SnapKV(12, window=4)), x, [40, *[1] * 10]))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_turned_query_is_one_that_stands_further_on(family: str):
    config = dict(BACKBONES[family])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    x, found = ids(1, 7), []
    for start in (0, 13):
        watch = Watch()
        with torch.no_grad():
            lm(x, past_key_values=watch.cache(lm), position_ids=torch.arange(start, start + 7)[None])
        found.append(watch.seen[0].query_BGRTD)
    moved = rotate_by_position(found[0], torch.tensor([13.0]), rotary_frequencies(lm, ""))
    torch.testing.assert_close(moved, found[1], atol=1e-3, rtol=1e-3)


def test_the_kept_set_is_that_of_moved_queries_over_the_whole_prompt():
    x, watch, lm = ids(1, 30), Watch(), model()
    lm(x, past_key_values=watch.cache(lm))
    cache = run(DapQ(SnapKV(10, window=4, kernel=1), ahead=4), x, [30])
    frequencies = rotary_frequencies(lm, "")
    for layer, heads in zip(cache.kept, kept(cache), strict=True):
        full = Watch().cache(lm)
        lm(x, past_key_values=full)
        keys = full.kept[layer.index].tables[0].keys[0]
        for head in range(2):
            score = torch.zeros(30)
            for r in range(2):
                for query in range(26, 30):
                    given = watch.seen[layer.index].query_BGRTD[0, head, r, query]
                    moved = rotate_by_position(given, torch.tensor(4.0), frequencies)
                    score += (keys[head] @ moved * 16**-0.5).softmax(0)
            assert heads[head] == best(score.tolist(), 10, {26, 27, 28, 29})


def test_no_pseudo_token_is_left_behind():
    cache = run(DapQ(SnapKV(10, window=4)), ids(1, 30), [30])
    assert cache.get_seq_length() == 30 and all(len(head) == 10 for layer in kept(cache) for head in layer)


def test_models_and_policies_that_do_not_fit_are_refused_in_words():
    config = dict(BACKBONES["gpt2"])
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(UserError, match="gpt2: DapQ moves queries by rotary positions"):
        DapQ(SnapKV(8, window=4)).cache(lm)
    with pytest.raises(UserError, match="an observation window at the end of the prompt"):
        DapQ(H2O(8))


def test_it_goes_around_head_budgets():
    cache = run(DapQ(AdaKV(SnapKV(10, window=4), safeguard=0.5)), ids(1, 30), [30])
    assert all(sum(map(len, layer)) == 20 for layer in kept(cache))

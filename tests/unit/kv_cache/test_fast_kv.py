"""FastKV: later layers see of a prompt what goes on, exactly as if the other hidden states had been dropped."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from helpers.architectures import ids
from helpers.policy_reference import best, kept, model, run, weights
from transformers import DynamicCache

from pondera import UserError
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.ada_kv import AdaKV
from pondera.methods.kv_cache.base import KVCache, KVCacheMethod
from pondera.methods.kv_cache.common.token_pruning import PrunedLayer, SelectorLayer
from pondera.methods.kv_cache.dap_q import DapQ
from pondera.methods.kv_cache.fast_kv import FastKV
from pondera.methods.kv_cache.h2o import H2O
from pondera.methods.kv_cache.snap_kv import SnapKV

LAYERS = 4


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def of_family(family: str) -> Any:
    return model(LAYERS, family, larger=1.5)


def snap(budget: int | float = 10, window: int = 4) -> SnapKV:
    return SnapKV(budget, window=window, kernel=3, pool="mean")


def masked(memory: FastKV) -> FastKV:
    """The slow twin: every decoder layer runs all tokens, and only the cache leaves some out."""
    memory.packed = False
    return memory


def chosen(cache: KVCache) -> list[list[int]]:
    """By row: the tokens that went on in the latest call."""
    chooser = next(layer for layer in cache.kept if isinstance(layer, SelectorLayer))
    assert chooser.choice is not None
    return [row[row >= 0].tolist() for row in chooser.choice.position_Bk]


def smoothed(heads: list[list[list[float]]]) -> list[float]:
    """What the last 4 queries of these heads give to each token before them, and the mean of 3 neighbours."""
    tokens = len(heads[0])
    score = [sum(head[-query][key] for head in heads for query in range(1, 5)) for key in range(tokens - 4)] + [0.0] * 4
    return [sum(score[max(0, key - 1) : key + 2]) / 3 for key in range(tokens)]


def test_the_tokens_that_go_on_are_those_of_plain_loops():
    x = ids(1, 40)
    cache = run(FastKV(snap(), tsp=15, tsp_layer=1), x, [40], LAYERS)
    heads = [head for group in weights(x, LAYERS)[1] for head in group]
    assert chosen(cache) == [best(smoothed(heads), 15, {36, 37, 38, 39})]
    assert all(set(head) <= set(chosen(cache)[0]) for layer in kept(cache)[2:] for head in layer)


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_what_dropping_hidden_states_gives(packed: bool):
    lm, x, at = model(LAYERS), ids(1, 40), 1
    memory = FastKV(snap(), tsp=15, tsp_layer=at)
    memory.packed = packed
    cache = memory.cache(lm)
    found = lm(x, past_key_values=cache).logits[0, -4:]
    # Slow and obvious: the first layers on everything, then the gathered states alone through the others.
    lm.set_attn_implementation("sdpa")
    h = lm(x, output_hidden_states=True, use_cache=False).hidden_states[at + 1]
    lm.set_attn_implementation("eager")
    place = torch.tensor(chosen(cache))
    h, later = h[:, place[0]], torch.full((15, 15), -torch.inf).triu(1)[None, None]
    rotary = lm.model.rotary_emb(h, position_ids=place)
    for number, layer in enumerate(lm.model.layers[at + 1 :], start=at + 1):
        gave = []
        handle = layer.self_attn.register_forward_hook(lambda _, __, out, gave=gave: gave.append(out[1][0].tolist()))
        h = layer(h, attention_mask=later, position_embeddings=rotary, position_ids=place)
        handle.remove()
        for group in range(2):
            heads = gave[0][2 * group : 2 * group + 2]
            stay = best(smoothed(heads), 10, {11, 12, 13, 14})
            assert kept(cache)[number][group] == [chosen(cache)[0][t] for t in stay]
            received = torch.tensor([sum(head[query][t] for head in heads for query in range(11, 15)) for t in stay])
            table = cast(KVStoreLayer, cache.kept[number]).tables[0]
            torch.testing.assert_close(table.note["received"][0, group], received, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, lm.lm_head(lm.model.norm(h))[0, -4:], atol=1e-5, rtol=1e-5)


def test_layers_are_as_long_as_both_budgets_say():
    x = ids(1, 40)
    for tsp, budget, lengths in [
        (15, 10, [10, 10, 10, 10]),
        (8, 10, [10, 10, 8, 8]),  # no more than went on
        (0.5, 0.25, [10, 10, 10, 10]),  # the share is of the prompt, so that the counts match
        (0.5, 1.0, [40, 40, 20, 20]),
        (1.0, 0.25, [10, 10, 10, 10]),
    ]:
        found = kept(run(FastKV(snap(budget), tsp, 1), x, [40], LAYERS))
        assert [{len(head) for head in layer} for layer in found] == [{length} for length in lengths]
    later = kept(run(FastKV(snap(), 8, 1), x, [30, *[1] * 10], LAYERS))
    assert [len(layer[0]) for layer in later] == [20, 20, 18, 18]
    assert all(head[-10:] == list(range(30, 40)) for layer in later for head in layer)


@pytest.mark.parametrize("memory", [FastKV(snap(), 8, LAYERS - 1), FastKV(snap(), tsp=1.0)])
def test_where_everything_goes_on_it_is_the_policy(memory: FastKV):
    x, lm = ids(2, 50), model(LAYERS)
    a, b = (run(each, x, [30, *[1] * 5], LAYERS) for each in (memory, snap()))
    assert kept(a) == kept(b)
    assert torch.equal(lm(x[:, 35:], past_key_values=a).logits, lm(x[:, 35:], past_key_values=b).logits)


def read(lm: Any, memory: KVCacheMethod, x: torch.Tensor, mask: torch.Tensor, pieces: list[int]) -> tuple[list, list]:
    """Logits of the last token of each piece, and what is kept after it."""
    cache, seen, logits, held = memory.cache(lm), 0, [], []
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for piece in x.split(pieces, dim=1):
        begin, seen = seen, seen + piece.shape[1]
        kwargs = {"attention_mask": mask[:, :seen], "position_ids": position_ids[:, begin:seen]}
        logits.append(lm(piece, past_key_values=cache, **kwargs).logits[:, -1])
        held.append([[head[head >= 0].sort().values.tolist() for table in layer.tables for row in table.position
                      for head in row] for layer in cache.kept])  # fmt: skip
    return logits, held


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "qwen3_mixed"])
@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 9, 25)])
def test_leaving_tokens_out_is_hiding_them(family: str, pads: tuple[int, ...]):
    lm, x = of_family(family), ids(3, 60)
    mask = (torch.arange(60) >= torch.tensor(pads)[:, None]).long()
    pieces = [32, 1, 1, 20, 1, 1, 4]
    for policy in (snap, lambda: AdaKV(snap(), safeguard=0.5)):
        found = read(lm, FastKV(policy(), tsp=0.4, tsp_layer=0), x, mask, pieces)
        expected = read(lm, masked(FastKV(policy(), tsp=0.4, tsp_layer=0)), x, mask, pieces)
        assert found[1] == expected[1]
        torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)


def rows_of(lm: Any, cache: Any, x: torch.Tensor) -> list[int]:
    """How many tokens each decoder layer's MLP runs in a call."""
    found: list[int] = []
    layers = lm.get_decoder().layers
    handles = [layer.mlp.register_forward_hook(lambda _, args, __: found.append(args[0].shape[1])) for layer in layers]
    lm(x, past_key_values=cache)
    for handle in handles:
        handle.remove()
    return found


def test_what_does_not_go_on_is_not_run_and_other_caches_are_left_alone():
    lm, x = copy.deepcopy(of_family("llama")), ids(2, 40)
    lm.set_attn_implementation("sdpa")
    stock = lm(x).logits
    cache = FastKV(snap(), tsp=10, tsp_layer=1).cache(lm)
    assert rows_of(lm, cache, x) == [40, 40, 10, 10] and rows_of(lm, cache, x[:, :1]) == [1] * 4
    again = copy.deepcopy(lm)
    for each in (lm, again):  # hooks are copied with a model, and act once
        assert rows_of(each, FastKV(snap(), tsp=10, tsp_layer=0).cache(each), x) == [40, 10, 10, 10]
        assert rows_of(each, masked(FastKV(snap(), tsp=10)).cache(each), x) == [40] * 4
        assert rows_of(each, snap().cache(each), x) == rows_of(each, DynamicCache(config=each.config), x) == [40] * 4
        assert torch.equal(each(x).logits, stock)
        assert len(each.model.layers[0]._forward_pre_hooks) == 1


def test_drafts_all_go_on():
    lm, x = model(LAYERS), ids(1, 40)
    held = []
    for memory in (FastKV(snap(), tsp=8, tsp_layer=1), snap()):
        cache = memory.cache(lm)
        cache.activate_past_recording()
        lm(x, past_key_values=cache)
        cache.crop(-3)
        lm(x[:, :1], past_key_values=cache)
        cache.crop(0)
        held.append(kept(cache))
    assert held[0] == held[1]


def test_tokens_behind_the_choice_cannot_be_taken_back():
    lm, x = model(LAYERS), ids(1, 40)
    cache = FastKV(snap(1.0), tsp=8, tsp_layer=1).cache(lm)
    lm(x, past_key_values=cache)
    with pytest.raises(UserError, match="activate_past_recording"):
        cache.crop(-3)


def test_wrappers_go_around_it_and_inside():
    x = ids(1, 40)
    outside = run(DapQ(FastKV(snap(), tsp=12, tsp_layer=1), ahead=0), x, [40], LAYERS)
    inside = run(FastKV(DapQ(snap(), ahead=0), tsp=12, tsp_layer=1), x, [40], LAYERS)
    plain = run(FastKV(snap(), tsp=12, tsp_layer=1), x, [40], LAYERS)
    assert kept(outside) == kept(inside) == kept(plain) and any(isinstance(one, PrunedLayer) for one in plain.kept)
    shared = run(FastKV(AdaKV(snap(), safeguard=0.5), tsp=12, tsp_layer=1), x, [40], LAYERS)
    assert all(sum(map(len, layer)) == 20 for layer in kept(shared)) and len(chosen(shared)[0]) == 12
    moved = [run(each, x, [40], LAYERS) for each in (DapQ(FastKV(snap(), 12, 1)), FastKV(DapQ(snap()), 12, 1))]
    assert kept(moved[0]) == kept(moved[1]) != kept(plain)


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(UserError, match="4 layers of this model are compressed; give a number from 0 to 3"):
        FastKV(snap(), tsp_layer=4).cache(model(LAYERS))
    with pytest.raises(UserError, match="give SnapKV"):
        FastKV(H2O(8))
    with pytest.raises(UserError, match="give SnapKV"):
        FastKV(FastKV(snap()))
    with pytest.raises(UserError, match="FastKV"):
        AdaKV(FastKV(snap()))
    for wrong in (7, 1.5, True, "64MiB"):
        with pytest.raises(UserError, match="at least 8"):
            FastKV(snap(), tsp=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tsp_layer=-1"):
        FastKV(snap(), tsp_layer=-1)

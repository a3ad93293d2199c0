"""LazyLLM: held to a simulation that runs token after token through layer after layer, with sets written out."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers.architectures import BACKBONES, ids
from helpers.policy_reference import best, kept, model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pondera import UserError
from pondera.cache.kv_store import EMPTY, KVStore
from pondera.cache.slot_layer import KVStoreLayer
from pondera.methods.kv_cache.base import KVCache
from pondera.methods.kv_cache.common.token_pruning import Selector
from pondera.methods.kv_cache.common.token_revival import RevivalLayer
from pondera.methods.kv_cache.lazy_llm import LazyLLM
from pondera.methods.kv_cache.preallocated_cache import PreallocatedCache

LAYERS = 4


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def of_family(family: str) -> Any:
    return model(LAYERS, family, larger=1.5)


def lazy() -> LazyLLM:
    return LazyLLM([0.7, 0.5], layers=[0, 2])


def stopping(cache: KVCache) -> list[RevivalLayer]:
    return [layer for layer in cache.kept if isinstance(layer, RevivalLayer)]


class Simulation:
    """A text read by plain loops: every token has a depth and a state, and a layer a dictionary of keys and values."""

    def __init__(self, lm: Any, shares: dict[int, float]) -> None:
        self.lm, self.shares = lm, shares
        self.state: list[Tensor] = []
        self.depth: list[int] = []
        self.rows: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in lm.model.layers]

    def read(self, x_T: Tensor) -> tuple[Tensor, list[set[int]]]:
        """Logits of the last token, and what goes on behind each layer that prunes."""
        begin = len(self.state)
        self.state += list(self.lm.model.embed_tokens(x_T))
        self.depth += [0] * len(x_T)
        last = len(self.state) - 1
        present, sets = set(range(last + 1)), []
        for number, layer in enumerate(self.lm.model.layers):
            going = [token for token in sorted(present) if self.depth[token] == number]
            for token in going:
                self.rows[number][token] = self.key_value(
                    layer.self_attn, layer.input_layernorm(self.state[token]), token
                )
            for token in going:
                weights = self.run(layer, number, token, sorted(t for t in present if t <= token))
            if number in self.shares:
                always = set(range(begin, last + 1)) if len(x_T) <= 8 else {last}
                count = max(int(self.shares[number] * len(present)), len(always))
                score = [weights.get(token, -torch.inf) for token in range(last + 1)]
                present = set(best(score, count, always))
                sets.append(present)
        return self.lm.lm_head(self.lm.model.norm(self.state[last])), sets

    def heads(self, attention: Any, name: str, h_D: Tensor) -> Tensor:
        """``[heads, 1, width]``."""
        found = getattr(attention, f"{name}_proj")(h_D).view(-1, 1, attention.head_dim)
        return getattr(attention, f"{name}_norm")(found) if hasattr(attention, f"{name}_norm") else found

    def rotated(self, rows_H1D: Tensor, token: int) -> Tensor:
        cos, sin = self.lm.model.rotary_emb(rows_H1D, position_ids=torch.tensor([[token]]))
        return apply_rotary_pos_emb(rows_H1D[None], rows_H1D[None], cos, sin)[0][0]

    def key_value(self, attention: Any, h_D: Tensor, token: int) -> tuple[Tensor, Tensor]:
        value = attention.v_proj(h_D).view(-1, attention.head_dim)
        return self.rotated(self.heads(attention, "k", h_D), token)[:, 0], value

    def run(self, layer: Any, number: int, token: int, looks: list[int]) -> dict[int, float]:
        """Runs a token through a layer; returns its weights, the mean over heads."""
        h, attention = self.state[token], layer.self_attn
        query = self.rotated(self.heads(attention, "q", layer.input_layernorm(h)), token)[:, 0]
        keys, values = (torch.stack([self.rows[number][t][part] for t in looks], 1) for part in (0, 1))
        keys, values = (rows.repeat_interleave(len(query) // len(rows), 0) for rows in (keys, values))
        weight = (torch.einsum("hd,hsd->hs", query, keys) * attention.scaling).softmax(-1)
        h = h + attention.o_proj(torch.einsum("hs,hsd->hd", weight, values).flatten())
        self.state[token], self.depth[token] = h + layer.mlp(layer.post_attention_layernorm(h)), number + 1
        return dict(zip(looks, weight.mean(0).tolist(), strict=True))


def held(cache: KVCache, number: int, row: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """What a layer keeps of a text, by token."""
    table = cast(KVStoreLayer, cache.kept[number]).tables[0]
    at = {int(token): slot for slot, token in enumerate(table.position[row, 0]) if token >= 0}
    return {token: (table.keys[row, :, slot], table.values[row, :, slot]) for token, slot in at.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_is_what_plain_loops_over_tokens_give(family: str):
    lm, x, pieces = of_family(family), ids(1, 50), [24, *[1] * 6, 12, 5, *[1] * 3]
    slow, cache = Simulation(lm, {0: 0.7, 2: 0.5}), lazy().cache(lm)
    taken_up = 0
    for piece in x.split(pieces, dim=1):
        logits, sets = slow.read(piece[0])
        torch.testing.assert_close(lm(piece, past_key_values=cache).logits[0, -1], logits, atol=1e-4, rtol=1e-4)
        for layer, expected in zip(stopping(cache), sets, strict=True):
            assert layer.choice is not None and layer.choice.present_BK is not None
            assert set(layer.choice.present_BK[0].nonzero()[:, 0].tolist()) == expected
            taken_up += int((layer.choice.position_Bk < layer.choice.begin).sum())
        for number, rows in enumerate(slow.rows):
            found = held(cache, number)
            assert set(found) == set(rows)
            for token, pair in rows.items():
                torch.testing.assert_close(found[token], pair, atol=1e-4, rtol=1e-4)
    assert taken_up > 20  # or nothing of interest was tested
    for layer, number in zip(stopping(cache), (0, 2), strict=True):  # those that wait are those that stopped there
        assert sorted(t for t in layer.waiting[0].tolist() if t >= 0) == [
            token for token, depth in enumerate(slow.depth) if depth == number + 1
        ]


def test_no_token_is_run_twice_by_a_layer():
    lm, x, cache = model(LAYERS), ids(1, 45), lazy().cache(model(LAYERS))
    runs: Counter[tuple[int, tuple[float, ...]]] = Counter()
    handles = [
        layer.mlp.register_forward_hook(
            lambda _, __, out, number=number: runs.update((number, tuple(row)) for row in out[0].tolist())
        )
        for number, layer in enumerate(lm.model.layers)
    ]
    for piece in x.split([40, *[1] * 5], dim=1):
        lm(piece, past_key_values=cache)
    for handle in handles:
        handle.remove()
    by_layer = [sum(count for (at, _), count in runs.items() if at == number) for number in range(LAYERS)]
    assert max(runs.values()) == 1
    assert by_layer == [len(layer[0]) for layer in kept(cache)] and by_layer[0] == 45 > by_layer[3]


class Told(LazyLLM):
    """Goes by sets that a test gives, one for each call."""

    sets: list[set[int]]

    def choose(self, layer: RevivalLayer, came: Selector) -> Tensor:
        position = layer.tables[0].position[:, 0]
        return torch.isin(position, torch.tensor(sorted(self.sets[0])))


def test_a_token_taken_up_has_the_rows_of_a_whole_prefill():
    lm, x, late = model(LAYERS), ids(1, 21), 5
    memory = Told(0.5, layers=[1])
    cache, full = memory.cache(lm), PreallocatedCache().cache(lm)
    memory.sets = [set(range(20)) - {late}]
    lm(x[:, :20], past_key_values=cache)
    assert late not in held(cache, 2) and stopping(cache)[0].waiting.tolist()[0].count(late) == 1
    memory.sets = [set(range(21))]
    lm(x[:, 20:], past_key_values=cache)
    lm(x, past_key_values=full)
    for number in range(LAYERS):
        ours, stock = held(cache, number), held(full, number)
        assert set(ours) == set(stock)
        for token in range(late + 1) if number == 3 else range(20):
            torch.testing.assert_close(ours[token], stock[token], atol=1e-5, rtol=1e-5)
    # Those behind it were run without it.
    assert not torch.allclose(held(cache, 3)[12][1], held(full, 3)[12][1], atol=1e-3)


def read(lm: Any, cache: Any, x: Tensor, mask: Tensor, pieces: list[int]) -> Tensor:
    """Logits of the last token of each piece."""
    found, seen, position = [], cache.get_seq_length(), (mask.cumsum(-1) - 1).clamp(min=0)
    for piece in x[:, seen : seen + sum(pieces)].split(pieces, dim=1):
        begin, seen = seen, seen + piece.shape[1]
        told = {"attention_mask": mask[:, :seen], "position_ids": position[:, begin:seen]}
        found.append(lm(piece, past_key_values=cache, **told).logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_padded_rows_with_choices_of_their_own_are_as_alone(family: str):
    lm, x, pads = of_family(family), ids(3, 60), (0, 9, 25)
    mask = (torch.arange(60) >= torch.tensor(pads)[:, None]).long()
    pieces = [36, *[1] * 9, 10, *[1] * 5]
    cache = lazy().cache(lm)
    found = read(lm, cache, x, mask, pieces)
    for row, pad in enumerate(pads):
        alone = lazy().cache(lm)
        expected = read(lm, alone, x[row : row + 1, pad:], mask[row : row + 1, pad:], [36 - pad, *pieces[1:]])
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        for number in range(LAYERS):
            assert {token - pad for token in held(cache, number, row)} == set(held(alone, number))


def test_a_table_whose_rows_take_turns_holds_no_more_slots_than_a_row_needs():
    new = torch.ones(2, 1, 1, 4)
    table = KVStore.like(new, new, {"note": 0.5})
    table.whole = False
    for token in range(40):
        table.append(token * new, new, torch.tensor([[token], [EMPTY]]).roll(token % 2, 0))
    assert [row[row >= 0].sort().values.tolist() for row in table.position[:, 0]] == [
        list(range(0, 40, 2)),
        list(range(1, 40, 2)),
    ]
    real = table.real
    assert torch.equal(table.keys[real][:, 0], table.position[real].float()) and bool(
        (table.note["note"][real] == 0.5).all()
    )
    assert table.used <= 22 and bool(table.keys.isfinite().all())


def test_a_saved_cache_and_rows_in_another_order_go_on_alike(tmp_path: Path):
    lm, x, mask = model(LAYERS), ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :4] = 0
    cache = lazy().cache(lm)
    read(lm, cache, x, mask, [31, 1])
    waiting = [layer.waiting.clone() for layer in stopping(cache)]
    assert all(bool((each >= 0).any()) for each in waiting)
    again, turned = (cache.method.load_cache(lm, cache.save(tmp_path / "read")) for _ in range(2))
    turned.reorder_cache(torch.tensor([1, 0]))
    expected = read(lm, cache, x, mask, [1] * 8)
    assert torch.equal(read(lm, again, x, mask, [1] * 8), expected)
    torch.testing.assert_close(
        read(lm, turned, x.flip(0), mask.flip(0), [1] * 8), expected.flip(0), atol=1e-5, rtol=1e-5
    )
    assert any(not torch.equal(a, b.waiting) for a, b in zip(waiting, stopping(cache), strict=True))
    assert cache.nbytes() >= sum(layer.stopped[0].nbytes() for layer in stopping(cache)) > 0


def test_drafts_leave_the_choice_as_it_was():
    lm, x = model(LAYERS), ids(1, 40)
    cache, plain = lazy().cache(lm), lazy().cache(lm)
    for one in (cache, plain):
        lm(x[:, :24], past_key_values=one)
    chosen = [layer.state["goes_on"][0].nonzero()[:, 0].tolist() for layer in stopping(cache)]
    before = [{token: pair[0].clone() for token, pair in held(cache, number).items()} for number in range(LAYERS)]
    cache.activate_past_recording()
    lm(x[:, 24:34], past_key_values=cache)
    for layer, earlier in zip(stopping(cache), chosen, strict=True):
        assert layer.choice is not None and layer.choice.present_BK is not None
        assert layer.choice.present_BK[0].nonzero()[:, 0].tolist() == [*earlier, *range(24, 34)]
        assert layer.choice.position_Bk[0].tolist() == list(range(24, 34))
    cache.crop(-10)
    assert [set(held(cache, number)) for number in range(LAYERS)] == [set(rows) for rows in before]
    assert all(torch.equal(pair[0], before[n][t]) for n in range(LAYERS) for t, pair in held(cache, n).items())
    # Drafts that stay are what they are in one call, and a cache that never held others says the same.
    plain.activate_past_recording()
    a, b = (lm(x[:, 24:30], past_key_values=one).logits for one in (cache, plain))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="activate_past_recording"):
        refused = lazy().cache(lm)
        lm(x, past_key_values=refused)
        refused.crop(-3)


def test_a_cache_of_another_model_and_settings_that_do_not_fit_are_refused_in_words():
    lm = model(LAYERS)
    for wrong in (0, 1.5, True, [0.5, "all"]):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            LazyLLM(wrong)  # type: ignore[arg-type]
    for layers in ([], [2, 1], [-1], 3):
        with pytest.raises(UserError, match="rising order"):
            LazyLLM(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give numbers from 0 to 2"):
        LazyLLM(layers=[3]).cache(lm)
    with pytest.raises(UserError, match="2 layers prune"):
        LazyLLM([0.5], layers=[0, 1]).cache(lm)
    for family, says in (("gpt2", "gpt2 cannot"), ("qwen3_next", "qwen3_next cannot"), ("qwen3_mixed", "windows")):
        with pytest.raises(UserError, match=says):
            LazyLLM().cache(of_family(family) if family != "qwen3_mixed" else mixed())


def mixed() -> Any:
    config = dict(BACKBONES["qwen3_mixed"])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def test_layers_and_shares_by_depth():
    assert [LazyLLM().at(depth) for depth in (1, 2, 3, 8, 32)] == [[], [0], [0, 1], [1, 3, 5], [7, 15, 23]]
    assert all(max(LazyLLM().at(depth)) <= depth - 2 for depth in range(2, 40))
    assert list(itertools.accumulate([0.6] * 3, lambda a, b: int(a * b), initial=100)) == [100, 60, 36, 21]

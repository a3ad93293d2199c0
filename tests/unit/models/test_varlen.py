"""Slots of different numbers per token: where they stand, what they see, and how tokens are taken back."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES
from helpers.fresh_process import copies

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.cache.columns import FREE, DepthSlots
from pondera.cache.depth_cache import DepthCache
from pondera.models.backbone import Backbone
from pondera.models.varlen import VarlenPass, VarlenSlots

COUNTS = torch.tensor([[1, 3, 2], [2, 1, 1]])  # slots of each token
WEIGHTS = torch.tensor([0.0, -0.5, -2.0])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@copies
def backbone(name: str) -> Backbone:
    torch.manual_seed(0)
    config = dict(BACKBONES[name])
    if "sliding_window" in config:
        config["sliding_window"] = 2  # tokens, so that the third no longer sees the first
    return AdaptiveLM(AdaptiveConfig(backbone=config)).eval().backbone


def inputs(made: Backbone) -> torch.Tensor:
    """``[B, T, N, D]``."""
    return torch.randn(2, 3, 3, made.config.hidden_size, generator=torch.Generator().manual_seed(1))


def all_at_once(made: Backbone, packed: bool) -> tuple[torch.Tensor, DepthCache]:
    cache = DepthCache(made.config.num_hidden_layers, 1)
    tokens = torch.arange(3).repeat_interleave(3).expand(2, -1)
    wanted = (torch.arange(3) < COUNTS[..., None]).flatten(1)
    slots = VarlenSlots(tokens, tokens, wanted, WEIGHTS.repeat(2, 3))
    states = VarlenPass(made, cache, None, 3, packed).run(inputs(made).flatten(1, 2), slots).unflatten(1, (3, 3))
    cache.record(COUNTS)
    return states, cache


def one_by_one(made: Backbone, packed: bool) -> tuple[torch.Tensor, DepthCache]:
    cache, x = DepthCache(made.config.num_hidden_layers, 1), inputs(made)
    states = torch.zeros_like(x)
    for token in range(3):
        ragged = VarlenPass(made, cache, None, token + 1, packed)
        for number in range(3):
            at = torch.full((2, 1), token)
            slots = VarlenSlots(at, at, COUNTS[:, token, None] > number, WEIGHTS[number].expand(2, 1))
            states[:, token, number] = ragged.run(x[:, token, number, None], slots)[:, 0]
        cache.record(COUNTS[:, token : token + 1])
    return states, cache


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_neox", "gpt2"])
def test_packed_or_masked_at_once_or_one_by_one_are_each_text_written_out(name: str):
    made = backbone(name)
    x = inputs(made)
    wanted = torch.arange(3) < COUNTS[..., None]
    found = [form(made, packed)[0] for form in (all_at_once, one_by_one) for packed in (True, False)]
    for text in range(2):
        at = torch.arange(3)[:, None].expand(3, 3)[wanted[text]]
        order = torch.arange(len(at))
        added = WEIGHTS.expand(3, 3)[wanted[text]].expand(len(at), -1).masked_fill(order[:, None] < order, -torch.inf)
        near = added.masked_fill(at[:, None] - at >= 2, -torch.inf)
        masks = {"full_attention": added[None, None], "sliding_attention": near[None, None]}
        kinds = set(made.layer_types)
        slow = made.decoder(
            inputs_embeds=x[text][wanted[text]][None],
            attention_mask=masks if len(kinds) > 1 else masks[kinds.pop()],
            position_ids=at[None],
            use_cache=False,
        ).last_hidden_state[0]
        for states in found:
            torch.testing.assert_close(states[text][wanted[text]], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [all_at_once, one_by_one])
def test_texts_are_stored_without_holes(form):
    _, cache = form(backbone("llama"), True)
    held = cache.depths[0]
    assert held.token_BC.tolist() == [[0, 1, 1, 1, 2, 2], [0, 0, 1, 2, FREE, FREE]]
    stored = [[0.0, 0.0, -0.5, -2.0, 0.0, -0.5], [0.0, -0.5, 0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(held.log_weight_BC, torch.tensor(stored))
    assert cache.layers[0].parts[0][0].shape[-2] == 6 and held.next_B.tolist() == [6, 4]
    assert one_by_one(backbone("llama"), False)[1].width(0) > 6, "the slow twin has holes, so this shows something"


def test_all_slots_of_a_token_are_taken_back_together():
    _, cache = all_at_once(backbone("llama"), True)
    held = cache.depths[0]
    assert isinstance(held, DepthSlots)
    assert held.before(2).token_BC.tolist() == [[0, 1, 1, 1], [0, 0, 1, FREE]]
    assert held.before(1).token_BC.tolist() == [[0, FREE], [0, 0]]
    assert held.before(0).token_BC.shape == (2, 0)
    cache.crop(-1)
    assert cache.width(0) == 4 == cache.layers[0].parts[0][0].shape[-2] and cache.tokens == 2
    assert not cache.is_aligned(0)


def test_reordered_texts_keep_their_weights():
    _, cache = all_at_once(backbone("llama"), True)
    before = cache.depths[0].log_weight_BC
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.depths[0].log_weight_BC, before[[1, 1]])
    assert cache.depths[0].next_B.tolist() == [4, 4]


def test_texts_are_repeated_with_their_weights_and_none_where_none_are_held():
    _, cache = all_at_once(backbone("llama"), True)
    before, keys = cache.depths[0].log_weight_BC, cache.layers[0].parts[0][0]
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.depths[0].log_weight_BC, before[[0, 0, 1, 1]])
    assert torch.equal(cache.layers[0].parts[0][0], keys[[0, 0, 1, 1]])
    cache.reset()
    cache.batch_repeat_interleave(2)
    assert cache.depths == [None] and cache.layers[0].parts == [None] and cache.tokens == 0

"""Packed rows: put beside their texts and back, and attended to as if they had stood there."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, ids

from pondera import AdaptiveConfig, AdaptiveLM
from pondera.cache.masks import SlotMask
from pondera.cache.packing import PackedRows

WANTED = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, False]])


@pytest.mark.parametrize("wanted", [WANTED, WANTED[:1], torch.ones(2, 3, dtype=torch.bool), WANTED[1:2]])
def test_gather_takes_back_what_spread_put_out(wanted: torch.Tensor):
    rows, x = PackedRows.where(wanted), torch.randn(1, int(wanted.sum()), 5)
    out = rows.pad(x)
    assert out.shape == (len(wanted), int(wanted.sum(-1).max()), 5)
    assert torch.equal(rows.unpad(out), x)
    assert float(out.abs().sum()) == pytest.approx(float(x.abs().sum()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_packed_is_each_text_alone(backbone: str, attention: str):
    torch.manual_seed(0)
    model = AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]))).eval().backbone
    model.lm.set_attn_implementation(attention)
    lengths = (5, 1, 3)
    texts = [model.embed(ids(1, length, seed=length)) for length in lengths]
    wanted = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    rows, order = PackedRows.where(wanted), torch.arange(5)
    mask = SlotMask((order[:, None] >= order)[None].expand(3, 5, 5), order[None], order[None])
    packed = model.step(torch.cat(texts, dim=1), None, mask, order.expand(3, 5)[wanted][None], rows)
    alone = torch.cat([model.step(text) for text in texts], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == attention  # put back

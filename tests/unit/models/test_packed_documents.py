"""Packed documents: several documents in one batch row, separated by position ids that restart."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import BACKBONES, LINEAR, ids
from helpers.fresh_process import copies
from helpers.trained_methods import METHODS
from transformers import AutoModelForCausalLM

from pondera import AdaptiveConfig, AdaptiveLM, UserError


@copies
def build(backbone: str = "llama", **chosen) -> AdaptiveLM:
    torch.manual_seed(0)
    return AdaptiveLM(AdaptiveConfig(backbone=dict(BACKBONES[backbone]), **chosen)).eval()


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = ids(1, 7), ids(1, 9, seed=2)
    return torch.cat([first, second], 1), torch.cat([torch.arange(7), torch.arange(9)])[None], second


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_plain_model_packs_as_its_backbone_does_or_refuses(backbone: str):
    model, (x, positions, second) = build(backbone), packed()
    if backbone in LINEAR:
        with pytest.raises(UserError, match="linear-attention"):
            model(x, position_ids=positions)
        return
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(model.config.backbone).eval()
    own = model(x, position_ids=positions).logits
    torch.testing.assert_close(own, theirs(x, position_ids=positions, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own[:, 7:], model(second).logits, atol=1e-5, rtol=1e-5)
    # and the texts would see each other without
    assert (model(x).logits[:, 7:] - model(second).logits).abs().max() > 1e-4


@pytest.mark.parametrize(("seam", "name"), METHODS)
def test_every_method_keeps_packed_texts_apart_or_refuses_them(seam: str, name: str):
    model, (x, positions, second) = build(**{seam: f"{name}()"}), packed()
    try:
        logits = model(x, position_ids=positions).logits
    except UserError as error:
        assert "document" in str(error)
        return
    torch.testing.assert_close(logits[:, 7:], model(second).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:, :7], model(x[:, :7]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", [{}, {"think": "PonderLM2(thoughts=1)"}, {"kv_cache": "H2O(budget=64)"}], ids=str)
def test_a_cache_holds_one_text_per_row(chosen):
    model, (x, positions, _) = build(**chosen), packed()
    with pytest.raises(UserError, match="position_ids.*use no cache"):
        model(x, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("chosen", [{}, {"think": "PonderLM2(thoughts=1)"}], ids=str)
def test_lengths_for_fused_kernels_need_the_positions_too(chosen):
    model, (x, positions, _) = build(**chosen), packed()
    lengths = {"cu_seq_lens_q": torch.tensor([0, 7, 16]), "cu_seq_lens_k": torch.tensor([0, 7, 16])}
    more = {"max_length_q": 9, "max_length_k": 9}
    assert torch.equal(
        model(x, position_ids=positions, **lengths, **more).logits, model(x, position_ids=positions).logits
    )
    with pytest.raises(UserError, match="cu_seq_lens_q.*position_ids"):
        model(x, **lengths, **more)


def test_one_text_per_row_is_not_told_apart():
    model, x = build(think="PonderLM2(thoughts=1)"), ids(2, 6)
    assert torch.equal(model(x, position_ids=torch.arange(6)[None]).logits, model(x).logits)
    torch.testing.assert_close(  # a text that begins later, as rotations see distances alone
        model(x, position_ids=torch.arange(4, 10)[None]).logits, model(x).logits, atol=1e-4, rtol=1e-4
    )
